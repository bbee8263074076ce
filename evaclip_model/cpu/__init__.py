"""Code that buys speed on CPUs alone; a reader of the GPU path can skip this folder.

linear.py (products by oneDNN), allocator.py (freed memory kept in the process), gloo_gather.py
(ZeRO's gathering by broadcasts). Each says what it buys, as measured in BENCHMARKS.md.
"""
