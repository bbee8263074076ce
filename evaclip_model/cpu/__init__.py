"""Code that buys speed on CPUs alone, as measured in BENCHMARKS.md; a reader of the GPU path can
skip this folder."""
