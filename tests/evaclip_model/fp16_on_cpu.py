"""Run a file or module as a rank whose CPU passes for one that computes in fp16.

`fp16_on_cpu.py TARGET ARGUMENTS...`. DeepSpeed refuses fp16 on most CPUs, for their slowness alone;
with this, the loss scale can be tested where there is no GPU.
"""

import runpy
import sys

from deepspeed.accelerator import get_accelerator


def allow():
    """From now on, in this process."""
    type(get_accelerator()).is_fp16_supported = lambda self: True


if __name__ == "__main__":
    allow()
    sys.argv = sys.argv[1:]
    run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
    run(sys.argv[0], run_name="__main__")
