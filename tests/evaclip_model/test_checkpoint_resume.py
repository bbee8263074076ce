"""Two cells of the resume matrix; `make test-train-faults` plays all of them, with more kills."""

import random

import pytest

from tests.faults.training import TOLERANCE, Training, differences

STEPS = 12


@pytest.fixture(scope="module")
def uninterrupted(ranks, tiny_data, tmp_path_factory):
    run = Training(ranks, tiny_data, tmp_path_factory.mktemp("whole"), "bf16", STEPS)
    run.to_the_end(2)
    return run


@pytest.mark.parametrize("after", [2, 1])
def test_killed_in_the_middle_of_a_save_it_goes_on_as_if_it_had_not_been(
    ranks, tiny_data, tmp_path, uninterrupted, after
):
    run = Training(ranks, tiny_data, tmp_path, "bf16", STEPS)
    assert run.killed(2, random.Random(after), in_a_save=True)
    assert not run.kills.wrong
    run.to_the_end(after)
    of_loss, of_weights = differences(run, uninterrupted)
    if after == 2:
        assert of_loss == of_weights == 0
    else:
        assert 0 < of_loss < TOLERANCE["bf16"]
