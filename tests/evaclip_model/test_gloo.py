"""Gathering over gloo, by ranks that check what they got."""

from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "gloo_worker.py"


@pytest.mark.parametrize("count", [2, 3])
def test_every_rank_gets_every_part_in_its_place(ranks, tmp_path, count):
    ranks.run(count, tmp_path, WORKER)
