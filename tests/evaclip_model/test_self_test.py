"""The self-test at the start of a run passes where all is well and fails where it is not."""

import json
from pathlib import Path

import pytest

RANK = Path(__file__).with_name("self_test_rank.py")


def run(ranks, count, folder, *arguments):
    out = folder / "found"
    ranks.run(count, folder, RANK, out, *arguments)
    return [json.loads(out.with_suffix(f".{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.parametrize(("count", "precision"), [(1, "fp32"), (3, "bf16")])
def test_it_passes_quickly(ranks, tmp_path, count, precision):
    for found in run(ranks, count, tmp_path, precision, "sound"):
        assert found["loss"] < 1e-6
        assert found["attention"] < 0.05
        assert found["seconds"] < 2


def test_a_loss_that_loses_gradients_over_ranks_stops_every_rank(ranks, tmp_path):
    for found in run(ranks, 2, tmp_path, "fp32", "broken"):
        assert "the loss over these ranks differs" in found["failed"]
