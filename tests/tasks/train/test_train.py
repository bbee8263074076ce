"""A training stage as a task runs it: real launcher, real ranks, a kill in the middle."""

import json
import os
import signal
from pathlib import Path

import pytest

from evaclip_model.create import open_model
from evaclip_model.errors import InputError
from tests.tasks.train.stage import processes_of, ranks_of, train

ONE, TWO = {"ranks": 1}, {"ranks": 2}


def test_a_rank_killed_in_the_middle_is_restarted_and_the_stage_is_whole(data, tmp_path):
    told = []
    killed = []

    def report(done: float, total: float, detail: str = "") -> None:
        told.append((done, total, detail))
        if done >= 12 and not killed:
            victim = ranks_of(tmp_path)[0]
            os.kill(victim.pid, signal.SIGKILL)
            killed.append(victim.pid)

    made = train(data, tmp_path, TWO, report)

    assert killed
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert made.counts["steps"] == 60
    assert made.counts["a.samples"] == made.counts["samples_seen"] == 720
    assert told[-1][:2] == (60, 60)
    assert any("images/s" in detail and "left" in detail for _, _, detail in told)
    assert any("goes on" in detail for _, _, detail in told)
    names = {str(path.relative_to(tmp_path)) for path in made.files}
    kept = {"train.json", "metrics.jsonl", "result.json"}
    model = {"config.json", "model.safetensors", "preprocessing.json"}
    assert names == kept | {f"model/{name}" for name in model}
    assert open_model(tmp_path / "model").config.vision.image_px == 8
    assert processes_of(tmp_path) == []

    again = train(data, tmp_path, TWO)
    assert again.counts == made.counts


def test_a_signal_that_was_not_ours_is_followed_by_a_start_from_the_last_step(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})  # threads wait for each other
    told = []

    def report(done: float, total: float, detail: str = "") -> None:
        told.append(detail)
        if done >= 1 and not any("signal" in detail for detail in told):
            for rank in ranks_of(tmp_path):
                rank.send_signal(signal.SIGTERM)

    train(data, tmp_path, {**ONE, "train_engine": "torch"}, report, samples_seen=12 * 100)
    assert any(detail == "stopped by a signal: goes on" for detail in told)
    assert not (tmp_path / "resumable").exists()


def test_a_stage_at_another_resolution_starts_from_resized_positions(data, tmp_path):
    train(data, tmp_path, ONE, image_px=12, samples_seen=24, patch_dropout=0.0)
    assert open_model(tmp_path / "model").config.vision.image_px == 12


def test_what_a_user_can_mend_is_one_sentence(data, tmp_path):
    with pytest.raises(InputError, match=r"training stage 'tiny': source_weights names 'b'"):
        train(data, tmp_path, ONE, source_weights={"b": 1.0})


def test_a_diverging_run_says_so(data, tmp_path):
    wild = {"optimizer": "adamw", "lr_vision": 1e30, "lr_text": 1e30, "grad_clip_norm": None}
    with pytest.raises(InputError, match=r"all its samples\) at step \d+, 4 times in a row: lower"):
        train(data, tmp_path, ONE, **wild)


def test_nothing_is_left_when_the_caller_is_interrupted(data, tmp_path):
    def report(done: float, total: float, detail: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path, ONE, report)
    assert processes_of(tmp_path) == []
    assert not (tmp_path / "result.json").exists()
    assert Path(tmp_path / "metrics.jsonl").exists()
