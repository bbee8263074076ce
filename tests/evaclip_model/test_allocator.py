"""Freed memory that stays: a large tensor made again and again costs no page faults."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys, torch
from contextlib import nullcontext
from evaclip_model.cpu.allocator import freed_memory_kept, keep_freed_memory

def faults():
    for _ in range(40):  # the first ones may leave gaps that are a few bytes too small
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = resident()
with freed_memory_kept() if sys.argv[1] == "for a while" else nullcontext():
    told = {"faults": faults(), "held": resident() - before}
print(json.dumps({**told, "left": resident() - before}))
"""
FEW, LARGE = 100, 1 << 26


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("how", "kept", "left"),
    [("returned", False, False), ("kept", True, True), ("for a while", True, False)],
)
def test_memory_that_is_freed_is_used_again(how: str, kept: bool, left: bool) -> None:
    told = json.loads(subprocess.check_output([sys.executable, "-c", PROGRAM, how], text=True))
    assert (told["faults"] < FEW) == (told["held"] >= LARGE) == kept, told
    assert (told["left"] >= LARGE) == left, told
