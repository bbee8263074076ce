"""Freed memory that stays: a large tensor made again costs no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from evaclip_model.training.allocator import keep_freed_memory
    assert keep_freed_memory()
torch.empty(1 << 28, dtype=torch.uint8).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(1 << 28, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_is_freed_is_used_again() -> None:
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", FAULTS, how], text=True))
        for how in ("kept", "returned")
    }
    assert faults["kept"] < 100, faults
    assert faults["returned"] > 100, "this machine does not need it"
