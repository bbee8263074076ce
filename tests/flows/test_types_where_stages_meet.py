"""The strict type checker sees every argument of a stage's work: three mistakes are planted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GRAPH = "flows/graph/graph.py"
MISTAKES = {
    # swapped
    "train_model(config, inputs, out, profile.launch, report)": (
        "train_model(inputs, config, out, profile.launch, report)"
    ),
    # wrong
    "Crew(processes, threads, profile.download_distributor)": (
        "Crew(3.14, threads, profile.download_distributor)"
    ),
    # missing
    "join_verifications([finished_artifact(one) for one in verified], out, report)": (
        "join_verifications([finished_artifact(one) for one in verified], out)"
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_swapped_a_wrong_and_a_missing_argument_are_errors_of_the_type_check(
    tmp_path: Path,
) -> None:
    text = (ROOT / GRAPH).read_text()
    lines = set()
    for right, wrong in MISTAKES.items():
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    for wrong in MISTAKES.values():
        line = text[: text.index(wrong)].count("\n") + 1
        lines.add(line)
    planted = tmp_path / "graph.py"
    planted.write_text(text)
    checked = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--shadow-file", GRAPH, str(planted)),
            *("--cache-dir", str(tmp_path / "cache"), GRAPH),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    errors = [line for line in checked.stdout.splitlines() if ": error: " in line]
    assert {int(line.split(":")[1]) for line in errors} == lines, checked.stdout + checked.stderr
