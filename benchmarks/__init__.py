"""What attnprobe costs, measured: ``python -m benchmarks.run``."""
