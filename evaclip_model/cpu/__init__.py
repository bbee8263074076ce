"""Code that buys speed on CPUs alone, as measured in BENCHMARKS.md; GPUs' path is without it."""
