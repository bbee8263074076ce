"""Checkpoints: whole or absent, for any cut of the parameters."""

import pytest
import torch

from evaclip_model.errors import InputError
from evaclip_model.training.checkpoint import Progress, checkpoints, load_newest, save_checkpoint
from evaclip_model.training.engine import StateFragment

SETTINGS = {"lr": 0.1, "towers": ["vision", "text"]}


def fragment(name, offset, values):
    kinds = ("param", "exp_avg", "exp_avg_sq")
    tensors = {kind: torch.tensor(values) + number for number, kind in enumerate(kinds)}
    return StateFragment(name, offset, tensors)


def progress(step):
    return Progress(step, {"updates": step}, {}, 1.0, SETTINGS)


def blank(name, offset, size):
    return fragment(name, offset, [float("nan")] * size)


def test_what_was_written_in_some_pieces_is_read_in_others(tmp_path):
    written = [fragment("w", 0, [1.0, 2, 3]), fragment("w", 3, [4.0, 5]), fragment("b", 0, [9.0])]
    save_checkpoint(tmp_path, written, progress(7), keep=2)
    read = [blank("w", 0, 1), blank("w", 1, 3), blank("w", 4, 1), blank("b", 0, 1)]
    assert load_newest(tmp_path, read, SETTINGS) == progress(7)
    assert read[1].tensors["param"].tolist() == [2, 3, 4]
    assert read[1].tensors["exp_avg_sq"].tolist() == [4, 5, 6]
    assert read[2].tensors["param"].tolist() == [5]
    assert read[3].tensors["exp_avg"].tolist() == [10]


def test_the_newest_are_kept_and_a_spoilt_one_is_passed_over(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, [fragment("w", 0, [float(step)])], progress(step), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]
    shard = tmp_path / "step-00000003/shard-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    read = [blank("w", 0, 1)]
    found = load_newest(tmp_path, read, SETTINGS)
    assert found is not None
    assert found.step == 2
    assert read[0].tensors["param"].tolist() == [2]


def test_a_checkpoint_of_other_settings_is_refused_and_a_half_written_one_is_none(tmp_path):
    save_checkpoint(tmp_path, [fragment("w", 0, [1.0])], progress(1), keep=2)
    read = [blank("w", 0, 1)]
    with pytest.raises(InputError, match=r"step-00000001/manifest.json was saved with lr = 0.1"):
        load_newest(tmp_path, read, {**SETTINGS, "lr": 0.2})
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.tmp")
    assert load_newest(tmp_path, read, SETTINGS) is None
    assert load_newest(tmp_path / "nowhere", read, SETTINGS) is None
