"""Checkpoints: whole or absent, for any cut of the parameters, in a folder or an object store."""

import json
import re
import resource
from contextlib import contextmanager

import fsspec
import pytest
import torch

from evaclip_model.errors import InputError
from evaclip_model.training.checkpoint.save_and_load import (
    CheckpointWriter,
    load_newest,
    save_checkpoint,
)
from evaclip_model.training.engine.engine import StateFragment
from evaclip_model.weights.checkpoint_format import TrainingProgress, list_checkpoints

SETTINGS = {"lr": 0.1, "towers": ["vision", "text"]}


def fragment(name, offset, values):
    kinds = ("param", "exp_avg", "exp_avg_sq")
    tensors = {kind: torch.tensor(values) + number for number, kind in enumerate(kinds)}
    return StateFragment(name, offset, tensors)


def progress(step):
    return TrainingProgress(step, {"updates": step}, {}, 1.0, SETTINGS)


def blank(name, offset, size):
    return fragment(name, offset, [float("nan")] * size)


@pytest.fixture(params=["folder", "store", "url of a folder"])
def location(request, tmp_path):
    if request.param == "folder":
        return tmp_path
    if request.param == "url of a folder":
        return f"file://{tmp_path}/run"
    store = fsspec.filesystem("memory")
    if store.exists("/bucket"):
        store.rm("/bucket", recursive=True)
    return "memory://bucket/run"


def write(location, *steps, keep=2):
    for step in steps:
        save_checkpoint(location, [fragment("w", 0, [float(step)])], progress(step), keep)


def loaded(location):
    """Step and value that are taken up."""
    read = [blank("w", 0, 1)]
    found = load_newest(location, read, SETTINGS)
    return found and (found.step, read[0].tensors["param"].item())


def change(location, name, how):
    with fsspec.open(f"{location}/{name}", "rb") as file:
        content = file.read()
    with fsspec.open(f"{location}/{name}", "wb") as file:
        file.write(how(content))


def test_what_was_written_in_some_pieces_is_read_in_others(location):
    written = [fragment("w", 0, [1.0, 2, 3]), fragment("w", 3, [4.0, 5]), fragment("b", 0, [9.0])]
    save_checkpoint(location, written, progress(7), keep=2)
    read = [blank("w", 0, 1), blank("w", 1, 3), blank("w", 4, 1), blank("b", 0, 1)]
    assert load_newest(location, read, SETTINGS) == progress(7)
    assert read[1].tensors["param"].tolist() == [2, 3, 4]
    assert read[1].tensors["exp_avg_sq"].tolist() == [4, 5, 6]
    assert read[2].tensors["param"].tolist() == [5]
    assert read[3].tensors["exp_avg"].tolist() == [10]


def cut_off(content):
    return content[:-1]


def one_bit_flipped(content):
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def other_step(content):
    return content.replace(b'"step": 3', b'"step": 5')


@pytest.mark.parametrize(
    ("file", "how", "why"),
    [
        ("shard-0.safetensors", cut_off, "has .* bytes where .* were written"),
        ("shard-0.safetensors", one_bit_flipped, "its checksum differs"),
        ("manifest.json", cut_off, "is cut off or no manifest"),
        ("manifest.json", other_step, "was altered"),
        ("manifest.json", lambda _: b'{"shard_bytes": [9]}', "by an earlier version"),
    ],
)
def test_a_spoilt_newest_one_is_passed_over_and_named(location, caplog, file, how, why):
    write(location, 2, 3)
    change(location, f"step-00000003/{file}", how)
    assert loaded(location) == (2, 2.0)
    assert caplog.records[0].levelname == "WARNING"
    assert re.search(f"step-00000003/{file}.* {why}", caplog.text)


def test_one_without_a_shard_is_passed_over(tmp_path, caplog):
    write(tmp_path, 2, 3)
    (tmp_path / "step-00000003/shard-0.safetensors").unlink()
    assert loaded(tmp_path) == (2, 2.0)
    assert "step-00000003/shard-0.safetensors is missing" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ([("w", 0, 2)], "holds 1 elements of 'w' (exp_avg) where the model has 2"),
        ([("w", 0, 1), ("b", 0, 1)], "holds no 'b'"),
        ([("b", 0, 1)], "holds no 'b'"),
        ([], "holds 'w' (exp_avg), which is not trained now"),
    ],
)
def test_nothing_is_touched_by_one_of_another_model(tmp_path, caplog, wanted, why):
    write(tmp_path, 3)
    read = [blank(*piece) for piece in wanted]
    assert load_newest(tmp_path, read, SETTINGS) is None
    assert why in caplog.text
    assert all(value.isnan().all() for piece in read for value in piece.tensors.values())


def test_one_of_other_settings_is_refused(location):
    write(location, 1)
    with pytest.raises(InputError, match=r"manifest.json was saved with lr = 0.1, which is 0.2"):
        load_newest(location, [blank("w", 0, 1)], {**SETTINGS, "lr": 0.2})


def test_one_of_a_later_version_is_refused_rather_than_an_older_one_taken(tmp_path):
    write(tmp_path, 1, 2)
    manifest = tmp_path / "step-00000002/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 3}))
    with pytest.raises(InputError, match=r"step-00000002.* is of form 3"):
        loaded(tmp_path)


def test_a_half_written_one_is_none_and_is_cleared_away(location):
    write(location, 1, 2)
    files, root = fsspec.core.url_to_fs(str(location))
    files.rm_file(f"{root}/step-00000002/manifest.json")
    half = f"{root}/step-00000002/shard-0.safetensors"
    assert loaded(location) == (1, 1.0)
    assert files.exists(half)
    CheckpointWriter(location, keep=2).close()
    files.invalidate_cache()
    assert not files.exists(half)
    assert loaded(location) == (1, 1.0)


def test_there_may_be_none(location):
    assert loaded(f"{location}/nowhere") is None
    CheckpointWriter(f"{location}/nowhere", keep=2).close()


def test_the_newest_are_kept_and_every_so_many_for_good(location):
    with CheckpointWriter(location, keep=2, keep_every_steps=4) as writer:
        for step in range(1, 8):
            writer.begin_save([fragment("w", 0, [float(step)])], progress(step))
    files, root = fsspec.core.url_to_fs(str(location))
    files.invalidate_cache()
    names = sorted(path.rpartition("/")[2] for path in files.ls(root, detail=False))
    assert names == [f"step-0000000{step}" for step in (4, 6, 7)]


def test_one_from_a_course_that_was_left_does_not_displace_a_good_one(tmp_path):
    write(tmp_path, 8, 12)
    shard = tmp_path / "step-00000012/shard-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert loaded(tmp_path) == (8, 8.0)
    write(tmp_path, 11, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000011"]
    assert loaded(tmp_path) == (11, 11.0)


def test_training_may_go_on_while_the_state_of_a_moment_is_written(location):
    state = fragment("w", 0, [1.0]), fragment("big", 0, [3.0] * 300_000)
    with CheckpointWriter(location, keep=2) as writer:
        writer.allocate_copies(state)
        for step in (1, 2):
            state[1].tensors["param"].fill_(step)
            writer.begin_save(state, progress(step))
            writer.wait_for_copy()
            state[1].tensors["param"].fill_(-1)
    read = [blank("w", 0, 1), blank("big", 0, 300_000)]
    assert load_newest(location, read, SETTINGS) == progress(2)
    assert torch.equal(read[1].tensors["param"], torch.full((300_000,), 2.0))


@contextmanager
def files_no_larger_than(size):
    """The kernel then refuses to write on, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_is_told_later_and_the_checkpoints_before_it_stay(tmp_path):
    write(tmp_path, 1, 2)
    writer = CheckpointWriter(tmp_path, keep=2)
    with files_no_larger_than(1_000_000):
        writer.begin_save([fragment("w", 0, [3.0] * 300_000)], progress(3))
        with pytest.raises(OSError, match="File too large"):
            writer.wait_for_save()
    assert not writer.has_failed()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert loaded(tmp_path) == (2, 2.0)
    writer.begin_save([fragment("w", 0, [3.0])], progress(3))
    writer.close()
    assert loaded(tmp_path) == (3, 3.0)


def test_a_url_of_an_unknown_kind_is_a_users_mistake():
    with pytest.raises(InputError, match="nosuch://bucket"):
        CheckpointWriter("nosuch://bucket", keep=1)
