"""Benchmarks of the whole program on one GPU, at full size: `python -m benchmarks.gpu` (see `__main__`)."""
