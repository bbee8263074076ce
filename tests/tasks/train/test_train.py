"""A training stage as a task runs it: real launcher, real ranks, a kill in the middle."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from evaclip_model.create import open_model
from evaclip_model.errors import InputError
from evaclip_model.training.worker import is_out_of_memory
from tasks.train.train import kernel_kills
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
    assert any("continues" in detail for _, _, detail in told)
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
    assert any(detail.startswith("a signal stopped training: ") for detail in told)
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


NOT_ENOUGH = """
import json, os, sys
from pathlib import Path

job = Path(sys.argv[1])
if (json.loads(job.read_text())["micro_batch"] or 12) > int(sys.argv[2]):
    (job.parent / "out-of-memory").touch()
    sys.exit(137)
os.execv(sys.executable, [sys.executable, "-m", "evaclip_model.training.worker", str(job)])
"""
"""Starts a rank on a machine whose memory holds so many pairs at once."""


def launch_where_memory_holds(pairs: int, folder: Path) -> dict[str, object]:
    script = folder / "not_enough.py"
    script.write_text(NOT_ENOUGH)
    command = f"{sys.executable} {script} {{job}} {pairs}"
    return {"launcher": "external", "ranks": 1, "submit_command": command}


def test_when_memory_runs_out_training_goes_on_once_with_half_as_many_pairs(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    told = []
    launch = launch_where_memory_holds(6, tmp_path)
    made = train(data, out, launch, lambda done, total, detail="": told.append(detail))
    assert made.counts["steps"] == 60
    assert json.loads((out / "train.json").read_text())["micro_batch"] == 6
    assert "memory ran out: training continues with a micro-batch of 6" in told


def test_when_half_is_too_much_too_it_says_what_to_set(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match=r"batch of 6 does not fit .* set EVACLIP_MICRO_BATCH"):
        train(data, out, launch_where_memory_holds(3, tmp_path))


def test_an_allocation_that_fails_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_the_kernels_count_of_kills_is_read(tmp_path):
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 3\n")
    assert kernel_kills(tmp_path / "vmstat") == 3
    assert kernel_kills(tmp_path / "absent") == 0
