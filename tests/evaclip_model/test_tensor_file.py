import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evaclip_model import create_model, save_model
from evaclip_model.weights.tensor_files import write_tensors


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The kernel refuses to write files longer than `size` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    write_tensors(tensors, tmp_path / "t.safetensors")
    back = load_file(tmp_path / "t.safetensors")
    assert {k: v.tolist() for k, v in back.items()} == {k: v.tolist() for k, v in tensors.items()}


def test_a_file_that_could_not_be_written_whole_is_gone_and_the_reason_is_the_systems(
    tmp_path: Path,
) -> None:
    with no_file_beyond(10_000), pytest.raises(OSError, match=r"t\.safetensors") as caught:
        write_tensors({"a": torch.ones(100_000)}, tmp_path / "t.safetensors")
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_could_not_be_saved_leaves_the_one_that_was_there(tmp_path: Path) -> None:
    save_model(create_model("EVA02-CLIP-demo", seed=0), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with no_file_beyond(10_000), pytest.raises(OSError):
        save_model(create_model("EVA02-CLIP-demo", seed=1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
