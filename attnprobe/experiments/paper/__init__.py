"""The paper's claims (arXiv 2512.22473), each as an experiment that can be run: ``attnprobe paper NAME``."""
