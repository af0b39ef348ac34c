"""Runnable experiments of the paper (arXiv 2512.22473): ``toy``, its closed form, and ``markov``, its task."""
