"""Tensors in one file: written through to the disk or not at all, so that a full disk is an
ordinary error and leaves no half file; and read one at a time.

No pickled code is run: torch's own reader is asked for plain content (`weights_only`), and for
shapes and places in the file alone. Other objects beside the weights are passed over: an empty
stand-in takes their place. Values are then read piece by piece to where they belong.
"""

import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evaclip_model.errors import InputError

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")
"""What torch's reader says about content that is not a plain tensor."""
_LUGGAGE = re.compile(
    r"(numpy|argparse|pathlib|datetime|collections|types|typing|uuid|enum|_codecs|omegaconf"
    r"|ml_collections|easydict|yacs|addict|mmengine|lightning|pytorch_lightning|lightning_fabric"
    r"|transformers|deepspeed|torch\.optim|torch\.torch_version)\."
)
"""Modules whose objects checkpoints hold beside their tensors, and no weights."""
_BUILTINS = ("int", "float", "complex", "list", "dict", "object", "range", "slice")
_WRAPPERS = ("model", "module", "state_dict", "model_state_dict")
"""Keys under which training programs keep the weights beside other state."""
_LARGEST_INFLATION = 8
"""Of a compressed file, as a multiple of its size; weights hardly shrink."""
SLAB_BYTES = 8 << 20
_DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}
_DTYPES |= {f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)}
_DTYPES |= {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor still in its file: shape and dtype are known, values are read when wanted."""

    shape: torch.Size
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]
    """Its values in row-major order, as [n] tensors; each is valid until the next. To be asked for
    once: what had to be read whole is let go of."""

    def read(self) -> Tensor:
        """Read the tensor, [*shape] of its own dtype; raises as `copy_to`."""
        value = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(value)
        return value

    def copy_to(self, destination: Tensor) -> None:
        """Write into `destination`, [*shape] of any dtype and device; raises InputError."""
        if not destination.is_contiguous():
            destination.copy_(self.read())
            return
        flat, done = destination.view(-1), 0
        for piece in self.pieces():
            flat[done : done + piece.numel()].copy_(piece)
            done += piece.numel()


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors`, contiguous [...] of any shapes on the CPU, to `path` as a safetensors file,
    and wait until they are on the disk. Raises OSError: the disk is full, say (safetensors has the
    number in its text only); `path` is gone then."""
    try:
        save_file(dict(tensors), path, metadata)
        path.chmod(0o644)  # safetensors leaves files that their owner alone can read
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        reason = _SYSTEM_ERROR.search(str(error))
        if reason is None or not isinstance(error, SafetensorError):
            raise
        number = int(reason[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; raises InputError: cut off, or quantised."""
    try:
        with safe_open(path, framework="pt"):  # checks the header against the file's length
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise _unreadable_error(path, str(error)) from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise InputError(
                f"{path}: '{name}' is of type {entry['dtype']}, not fp64, fp32, fp16 or bf16: "
                "give unquantised weights"
            )
        place = 8 + length + entry["data_offsets"][0]
        found[name] = _on_disk(path, place, torch.Size(entry["shape"]), dtype)
    return found


def read_torch(path: Path, *, allow_torchscript: bool = False) -> dict[str, StoredTensor]:
    """The tensors of a torch file by name, taken out of `model`, `module` or `state_dict`.

    Files of torch 1.6 and newer are read piece by piece; older ones and TorchScript archives are in
    memory whole until their tensors are taken. `allow_torchscript` runs the archive's own
    initialisation, so only where its origin is trusted.

    Raises InputError: unreadable or cut off; needs pickled classes; a TorchScript archive, unasked.
    """
    try:
        is_script, is_plain = _inspect_archive(path)
        if is_script:
            return _from_script(path, allow_torchscript)
        content = _load_past_luggage(path, "meta" if is_plain else "cpu")
    except InputError:
        raise
    except Exception as error:  # torch's reader stumbles over malformed content in any way
        raise _make_refusal(path, error) from error
    tensors = {
        str(key): value
        for key, value in _find_state(content).items()
        if isinstance(value, Tensor) and value.layout is torch.strided
    }
    del content
    if is_plain:
        return {key: _from_meta(path, value) for key, value in tensors.items()}
    return _in_memory(tensors)


class _Luggage:
    """Stands in for any object that is not a tensor: made of anything, it keeps nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _load_past_luggage(path: Path, device: str) -> Any:
    """The content of a torch file, with stand-ins for what `_LUGGAGE` names; numpy's own
    constructors are not called either: a forged dtype reaches foreign memory."""
    places: dict[str, Any] = {f"builtins.{name}": _Luggage for name in _BUILTINS}
    # of mappings with a default, whose items follow
    places["collections.defaultdict"] = lambda *_: {}
    while True:
        stands_in: list[Any] = [(found, name) for name, found in places.items()]
        try:
            with torch.serialization.safe_globals(stands_in):
                return torch.load(path, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            # torch names one class at a time, before it reads any values of an uncompressed file.
            named = _FORBIDDEN.search(str(error))
            if named is None or named[1] in places or not _LUGGAGE.match(named[1]):
                raise
            places[named[1]] = _Luggage


def _inspect_archive(path: Path) -> tuple[bool, bool]:
    """Return whether a file is a TorchScript archive, and whether its tensors lie uncompressed."""
    if not zipfile.is_zipfile(path):
        return False, False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if sum(member.file_size for member in members) > _LARGEST_INFLATION * path.stat().st_size:
        raise _unreadable_error(path, "it is compressed far beyond what weights can be")
    is_script = any(member.filename.endswith("/constants.pkl") for member in members)
    return is_script, all(member.compress_type == zipfile.ZIP_STORED for member in members)


def _from_script(path: Path, allowed: bool) -> dict[str, StoredTensor]:
    if not allowed:
        raise InputError(
            f"{path} is a TorchScript archive, which holds code: if you trust its origin, open it "
            "with allow_torchscript=True"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have no TorchScript at all
        module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    return _in_memory(dict(module.state_dict()))


def _find_state(content: Any) -> Mapping[Any, Any]:
    """The innermost mapping that wrappers lead to."""
    if not isinstance(content, Mapping):
        return {}
    wrapped = (content[wrapper] for wrapper in _WRAPPERS if wrapper in content)
    inner = next((value for value in wrapped if isinstance(value, Mapping)), None)
    return content if inner is None else _find_state(inner)


def _in_memory(tensors: dict[str, Tensor]) -> dict[str, StoredTensor]:
    """Each is let go of when it is taken, so that memory goes from the file to the model."""

    def taken(key: str) -> Iterator[Tensor]:
        yield tensors.pop(key).detach().reshape(-1)

    return {
        key: StoredTensor(value.shape, value.dtype, partial(taken, key))
        for key, value in tensors.items()
    }


def _from_meta(path: Path, tensor: Tensor) -> StoredTensor:
    """Return what torch's reader found out about a tensor without reading its values; refuse one
    that, expanded or made up, is larger than its values in the file."""
    storage: Any = tensor.untyped_storage()
    if tensor.numel() * tensor.itemsize > min(storage.nbytes(), path.stat().st_size):
        shape = " x ".join(map(str, tensor.shape))
        raise _unreadable_error(path, f"it claims a tensor of {shape} and holds fewer values")
    place = storage._checkpoint_offset + tensor.storage_offset() * tensor.itemsize
    if tensor.is_contiguous():
        return _on_disk(path, place, tensor.shape, tensor.dtype)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps)
    flat = _on_disk(path, place, torch.Size([span]), tensor.dtype)

    def in_order() -> Iterator[Tensor]:
        yield flat.read().as_strided(tensor.shape, tensor.stride()).reshape(-1)

    return StoredTensor(tensor.shape, tensor.dtype, in_order)


def _on_disk(path: Path, place: int, shape: torch.Size, dtype: torch.dtype) -> StoredTensor:
    return StoredTensor(shape, dtype, partial(_iterate_slabs, path, place, shape.numel(), dtype))


def _iterate_slabs(path: Path, place: int, count: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """`count` values from byte `place` on, in one buffer that is filled again and again."""
    largest = min(count, SLAB_BYTES // dtype.itemsize)
    buffer = torch.empty(largest, dtype=dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(place)
        for done in range(0, count, max(largest, 1)):
            slab = buffer[: count - done]
            if file.readinto(slab.view(torch.uint8).numpy().data) != slab.nbytes:
                raise InputError(f"{path} is cut off: copy or download it again")
            yield slab


def _make_refusal(path: Path, error: Exception) -> InputError:
    forbidden = _FORBIDDEN.search(str(error))
    if forbidden is None:
        said = str(error) if isinstance(error, OSError) else "no torch file"
        return _unreadable_error(path, said)
    return InputError(
        f"{path} holds objects of {forbidden[1]} besides tensors, and opening them would run "
        "pickled code: where you trust it, open it with torch.load(..., weights_only=False) and "
        "save its state dict alone"
    )


def _unreadable_error(path: Path, reason: str) -> InputError:
    if path.is_file() and path.stat().st_size == 0:
        reason = "it is empty"
    return InputError(
        f"{path} cannot be read as weights ({reason}): it is cut off or of another kind; copy or "
        "download it again"
    )
