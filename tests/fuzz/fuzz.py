"""Coverage-guided fuzzing of every boundary that strangers' bytes reach (targets.py), with atheris.

    python tests/fuzz/fuzz.py [TARGET ...]      FUZZ_SECONDS each, 600 where it is not set

Inputs that broke a promise are named and kept under `fuzz-findings/`; a mended one goes into the
corpus under a name that says what it was.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
FINDINGS = Path("fuzz-findings")
MOST_BYTES = 20_000
LIMITS = ("-timeout=60", "-rss_limit_mb=4000", f"-max_len={MOST_BYTES}", "-print_final_stats=1")


def run_target(name: str) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["evaclip_model", "flows", "tasks"]):
        from tests.fuzz.targets import TARGETS
    TARGETS[name](b"")  # what a target imports and opens at first is no input's time
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


def start_target(name: str, seconds: int) -> int:
    """Fuzz one target in a process of its own; returns its status, 0 where nothing was found."""
    FINDINGS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as found:
        command = [sys.executable, __file__, f"--target={name}", *LIMITS]
        command += [f"-max_total_time={seconds}", f"-artifact_prefix={FINDINGS}/{name}-"]
        done = subprocess.run(
            [*command, found, *map(str, [CORPUS / name] if (CORPUS / name).is_dir() else [])],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    counts = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stderr))
    inputs, kept = counts.get("number_of_executed_units", "?"), counts.get("new_units_added", "?")
    verdict = "nothing found" if done.returncode == 0 else f"a finding, in {FINDINGS}/"
    sys.stdout.write(f"{name}: {inputs} inputs, {kept} of new coverage, {verdict}\n")
    sys.stdout.flush()
    if done.returncode:
        sys.stdout.write(done.stderr[-3000:])
    return done.returncode


def main(names: list[str]) -> int:
    from tests.fuzz.targets import TARGETS

    seconds = int(os.environ.get("FUZZ_SECONDS", "600"))
    return max(start_target(name, seconds) for name in names or TARGETS)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("--target="):
        run_target(sys.argv.pop(1).partition("=")[2])
    else:
        sys.exit(1 if main(sys.argv[1:]) else 0)
