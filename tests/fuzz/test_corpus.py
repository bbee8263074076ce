"""Every target over its committed inputs: seeds, and what fuzzing once found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(path for path in CORPUS.glob("*/*"))


def test_every_target_has_inputs_and_the_corpus_is_small() -> None:
    assert {path.parent.name for path in INPUTS} == set(TARGETS)
    assert sum(path.stat().st_size for path in INPUTS) < 200_000


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_committed_input_keeps_every_promise(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())
