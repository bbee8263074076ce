"""Ranks that hang leave their stacks behind and end; those that step are left alone."""

import json
import os
import signal
import time
from pathlib import Path

STUCK = Path(__file__).with_name("stuck_rank.py")


def test_a_stuck_rank_and_the_one_that_waits_for_it_write_their_stacks_and_end(ranks, tmp_path):
    codes = ranks.wait(ranks.start(2, tmp_path, STUCK, tmp_path, 2.0, "stuck"))
    assert codes == [1, 1]
    waiting, stuck = ((tmp_path / f"stacks-{rank}.txt").read_text() for rank in (0, 1))
    assert "in hang" in stuck
    assert "in all_reduce" in waiting
    assert "no step for 2 s" in stuck
    assert json.loads((tmp_path / "heartbeat-1.json").read_text())["step"] == 1


def test_a_signal_writes_stacks_and_the_run_goes_on(ranks, tmp_path):
    pids = ranks.start(1, tmp_path, STUCK, tmp_path, 60.0, "slow")
    deadline = time.monotonic() + 60
    while not (tmp_path / "heartbeat-0.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pids[0], signal.SIGUSR1)
    assert ranks.wait(pids) == [0]
    assert "in slow" in (tmp_path / "stacks-0.txt").read_text()


def test_a_run_that_steps_leaves_no_stacks(ranks, tmp_path):
    assert ranks.wait(ranks.start(1, tmp_path, STUCK, tmp_path, 1.0, "steady")) == [0]
    assert not (tmp_path / "stacks-0.txt").exists()
