"""What a rank is told, and what of it decides the artifact's address."""

import json
from pathlib import Path

from tasks.artifacts.artifact import Address
from tasks.train.config import STAGE
from tests.tasks.train.stage import config, try_out


def test_settings_that_change_no_result_change_no_address():
    first = Address.of(Path("/runs"), STAGE, config())
    how = {"zero_stage": 0, "checkpoints": {"keep": 9}}
    assert Address.of(Path("/runs"), STAGE, config(**how)).digest == first.digest
    assert Address.of(Path("/runs"), STAGE, config(lr_vision=1e-5)).digest != first.digest


def test_a_try_out_takes_what_the_launch_says_and_leaves_no_weights(data, tmp_path):
    launch = {"ranks": 1, "train_engine": "torch", "micro_batch": 4, "watchdog_s": 60}
    launch |= {"read_workers": 0, "checkpoint_url": f"{tmp_path}/elsewhere/"}
    found = try_out(data, tmp_path / "run", launch)
    assert (found["ranks"], found["micro_batch"]) == (1, 4)
    assert found["loss"] > 0 and found["grad_norm"] > 0
    job = json.loads((tmp_path / "run" / "train.json").read_text())
    told = {name: job[name] for name in ("engine", "micro_batch", "watchdog_s", "checkpoints")}
    assert told == {
        "engine": "torch",
        "micro_batch": 4,
        "watchdog_s": 60.0,
        "checkpoints": f"{tmp_path}/elsewhere/run",
    }
    assert not (tmp_path / "run" / "model").exists()
    assert not list(tmp_path.glob("elsewhere/run/step-*"))
