"""Checkpoints of several ranks: real processes over gloo, of other numbers, failing and killed."""

import errno
import json
import os
import random
import signal
import time
from pathlib import Path

RANK = Path(__file__).with_name("checkpoint_rank.py")


def start(ranks, count, folder, steps, fails_on=-1):
    return ranks.start(count, folder, RANK, folder, steps, fails_on)


def ended(ranks, pids, folder):
    """What each rank told, once all have ended well."""
    codes = ranks.wait(pids)
    logs = "".join(path.read_text()[-3000:] for path in folder.glob("rank-*.log"))
    assert codes == [0] * len(pids), logs
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(len(pids))]


def test_ranks_at_paces_of_their_own_save_together_and_other_numbers_go_on(ranks, tmp_path):
    first = 0
    for count, steps in ((2, 12), (3, 16), (1, 20)):
        told = ended(ranks, start(ranks, count, tmp_path, steps), tmp_path)
        assert told == [{"from": first, "error": None, "done": steps}] * count
        first = steps
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000019", "step-00000020"]


def test_what_one_rank_cannot_write_stops_all_of_them_with_its_reason(ranks, tmp_path):
    told = ended(ranks, start(ranks, 2, tmp_path, 12, fails_on=1), tmp_path)
    assert [one["error"] for one in told] == [f"OSError {errno.EFBIG}"] * 2
    assert told[0]["done"] == told[1]["done"] < 7
    told = ended(ranks, start(ranks, 2, tmp_path, 12), tmp_path)
    assert told == [{"from": 3, "error": None, "done": 12}] * 2


def test_a_rank_killed_in_the_middle_of_a_save_leaves_the_checkpoint_before_it(ranks, tmp_path):
    chance = random.Random(3)
    before = 0
    for _ in range(2):
        pids = start(ranks, 2, tmp_path, 10**6)
        deadline = time.monotonic() + 60
        moment = before + chance.randrange(3, 9)
        while not any(
            int(path.name[5:]) >= moment and not (path / "manifest.json").exists()
            for path in (tmp_path / "checkpoints").glob("step-*")
        ):
            assert time.monotonic() < deadline, "nothing is saved"
        os.kill(pids[chance.randrange(2)], signal.SIGKILL)
        codes = ranks.wait(pids)
        assert -signal.SIGKILL in codes
        assert 0 not in codes
        before = max(
            int(path.name[5:])
            for path in (tmp_path / "checkpoints").glob("step-????????")
            if (path / "manifest.json").exists()
        )
        assert moment - 2 <= before
    told = ended(ranks, start(ranks, 2, tmp_path, before + 5), tmp_path)
    assert told == [{"from": before, "error": None, "done": before + 5}] * 2
