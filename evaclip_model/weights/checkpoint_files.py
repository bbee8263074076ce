"""The files that make up a checkpoint, and the tensors in them by name, without what training
programs put before it: single files, sharded checkpoints with an index, saved models' folders,
DeepSpeed's and this package's training checkpoints; and weights that stay where they are, of which
a small file in their place says where, how many, and which."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

import torch
from pydantic import Field

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.files import refuse_special
from evaclip_model.reading.urls import read_text
from evaclip_model.weights.checkpoint_format import MANIFEST, list_checkpoints, stored_parameters
from evaclip_model.weights.tensor_files import StoredTensor, read_safetensors, read_torch

WEIGHTS_FILE = "model.safetensors"
"""Name of the weights in a saved model's folder, here and at Hugging Face."""
_INDEX = ".index.json"
DEEPSPEED_STATES = "mp_rank_00_model_states.pt"
_WRAPPING_MODULES = {"module", "_orig_mod", "model"}
"""Parts of names that come from DataParallel, DeepSpeed, torch.compile and Lightning."""


def open_tensors(
    path: str | Path, *, shapes: Mapping[str, torch.Size], allow_torchscript: bool = False
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, still on disk.

    Args:
        path: a .safetensors, .pt or .bin file; the index of a sharded checkpoint; a folder that
            holds one of these or a `save_model`; a folder of DeepSpeed or of our training. Raises
            InputError if there is nothing, or nothing readable.
        shapes: of parameters by name; training checkpoints of this package keep them flat.
    """
    path = Path(path)
    if path.is_dir():
        tensors = _of_folder(path, shapes, allow_torchscript)
    elif path.name.endswith(_INDEX):
        tensors = _of_index(path, allow_torchscript)
    else:
        tensors = _of_file(path, allow_torchscript)
    if not tensors:
        raise InputError(f"{path} holds no tensors with names: give a state dict of a model")
    named: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        name = plain_name(key)
        if name in named:
            raise InputError(f"{path} holds '{name}' twice, also as '{key}': keep one of them")
        named[name] = tensor
    return named


def plain_name(key: str) -> str:
    """The name of a weight without the modules that training programs wrap a model in."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPING_MODULES)


def find_newest_deepspeed(folder: Path) -> Path | None:
    """The checkpoint that DeepSpeed's file `latest` in a training's folder names, if any."""
    newest = folder / "latest"
    if not newest.is_file():
        return None
    return folder / Path(newest.read_text(errors="replace").strip()).name


def _of_file(path: Path, allow_torchscript: bool) -> dict[str, StoredTensor]:
    refuse_special(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a .safetensors or .pt file of weights")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return read_torch(path, allow_torchscript=allow_torchscript)


def _of_folder(
    folder: Path, shapes: Mapping[str, torch.Size], allow_torchscript: bool
) -> dict[str, StoredTensor]:
    if (folder / MANIFEST).is_file() and any(folder.glob("shard-*.safetensors")):
        return _of_training(folder, shapes)
    if whole := list_checkpoints(folder):
        return _of_training(whole[0], shapes)
    for place in filter(None, (folder, find_newest_deepspeed(folder))):
        states = sorted(place.glob("mp_rank_*_model_states.pt"))
        if states and [path.name for path in states] != [DEEPSPEED_STATES]:
            raise InputError(
                f"{place} holds {len(states)} model states where one is expected, "
                f"{DEEPSPEED_STATES}: join model-parallel ones with DeepSpeed's own tools first"
            )
        if states:
            return read_torch(states[0])
    if (folder / WEIGHTS_FILE).is_file():
        return read_safetensors(folder / WEIGHTS_FILE)
    preferred = ((f".safetensors{_INDEX}",), (_INDEX,), (".safetensors",), (".bin", ".pt", ".pth"))
    for endings in preferred:
        found = [path for ending in endings for path in sorted(folder.glob(f"*{ending}"))]
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:3]) + " …" * (len(found) > 3)
            raise InputError(
                f"{folder} holds several files of weights ({names}): name the one to load"
            )
        if found:
            read = _of_index if endings[0].endswith(_INDEX) else _of_file
            return read(found[0], allow_torchscript)
    raise InputError(
        f"{folder} holds no weights: expected {WEIGHTS_FILE}, another .safetensors, .bin or .pt "
        "file, a sharded checkpoint's index, or a training checkpoint"
    )


def _of_index(index: Path, allow_torchscript: bool) -> dict[str, StoredTensor]:
    """The shards of a checkpoint as Hugging Face's libraries write it."""
    try:
        places = json.loads(read_text(index))["weight_map"]
        names = sorted(set(places.values()))
        is_plain = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{index} is not the index of a sharded checkpoint ({error!r}): expected 'weight_map' "
            "with the file of each tensor"
        ) from error
    if not is_plain:
        raise InputError(f"{index} names files outside its own folder: give the original index")
    shards = {name: _of_file(index.with_name(name), allow_torchscript) for name in names}
    missing = [key for key, name in places.items() if key not in shards[name]]
    if missing:
        raise InputError(
            f"{index.with_name(places[missing[0]])} lacks '{missing[0]}', which {index.name} says "
            "it holds: download both again"
        )
    return {key: shards[name][key] for key, name in places.items()}


def _of_training(folder: Path, shapes: Mapping[str, torch.Size]) -> dict[str, StoredTensor]:
    found = {}
    for name, whole in stored_parameters(folder).items():
        shape = shapes.get(name, whole.shape)
        found[name] = replace(whole, shape=shape) if shape.numel() == whole.shape[0] else whole
    return found


REFERENCE_FILE = f"{WEIGHTS_FILE}.json"
"""Stands in a saved model's folder where the weights would."""
Download = Callable[[str, Path], Path]
"""From a URI and a folder to the file that was put there."""


class Reference(Config):
    uri: str
    """`file:///…`, or a URI of an object store."""
    size: int = Field(gt=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The reference in a model's folder, if any; raises InputError if it cannot be read."""
        path = folder / REFERENCE_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not a reference to weights ({error})") from None
        return cls.from_mapping(values, where=str(path))

    @property
    def path(self) -> Path | None:
        """The file, if it is one of this machine's or of a disk that it shares."""
        parts = urlsplit(self.uri)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

    def obtain_weights(self, folder: Path, download: Download) -> Path:
        """The weights: in their place if that can be reached, else put into `folder`; raises
        InputError."""
        try:
            file = self.path or download(self.uri, folder)
            is_same_size = file.stat().st_size == self.size
        except Exception as error:  # every store has errors of its own
            raise InputError(
                f"the weights at {self.uri} cannot be read ({type(error).__name__}: "
                f"{str(error)[:160]}): make that place reachable from here"
            ) from error
        if is_same_size:
            with file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() == self.sha256:
                    return file
        raise InputError(
            f"the weights at {self.uri} are not those that were registered (size or sha256 "
            "differs): put the originals back, or register the model again"
        )


@contextmanager
def at_hand(folder: Path, download: Download) -> Iterator[Path]:
    """A saved model's folder with its weights in it, whether they are there or referred to; what
    had to be fetched is deleted at the end. Raises as `Reference.obtain_weights`."""
    reference = Reference.read(folder)
    if reference is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="evaclip-weights-") as temporary:
        whole = Path(temporary) / "model"
        whole.mkdir()
        for file in folder.iterdir():
            if file.name != REFERENCE_FILE:
                (whole / file.name).symlink_to(file.absolute())
        weights = reference.obtain_weights(Path(temporary), download)
        (whole / WEIGHTS_FILE).symlink_to(weights.absolute())
        yield whole
