"""Weights on disk: saving a model, and starting from anybody's checkpoint.

Not here: a saved folder as a model (create.py); reading files (checkpoint_files.py); whose names
are whose (name_maps.py); writing other libraries' layouts (export.py); training state
(training/checkpoint/).

Loading is strict: whatever is in a file either belongs to the model, or is known to be of no use,
or is an error. Image positions are resized bicubically without antialiasing, as the released
models were; text positions are stretched in a line or cut.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip_model.errors import InputError
from evaclip_model.files import replace_file, write_atomically
from evaclip_model.model.clip import EvaClip
from evaclip_model.model.layers import to_float32
from evaclip_model.model.model_config import CONFIG_FILE, INITIAL_LOGIT_BIAS, LOGIT_BIAS, SCALARS
from evaclip_model.reading.transform import describe_preprocessing
from evaclip_model.weights.checkpoint_files import WEIGHTS_FILE, open_tensors, plain_name
from evaclip_model.weights.name_maps import Entry, Layout, Names, may_lack, native_names
from evaclip_model.weights.tensor_files import StoredTensor, write_tensors

PREPROCESSING_FILE = "preprocessing.json"
"""What a saved model's images went through (`transform.describe_preprocessing`)."""
Part = Literal["all", "vision", "text"]
_PREFIX = {"vision": "visual.", "text": "text."}
_JOINT = ("visual.head.", "text.text_projection", *SCALARS)
"""The joint space: it belongs to the pair of towers, so one tower's file does not decide it."""
_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TRAINED_POSITIONS = 20
"""Text positions that are never stretched: web captions rarely have more tokens, so only these are
well trained (Long-CLIP, arXiv 2403.15378), and short captions keep their features."""


@dataclass(frozen=True)
class LoadReport:
    """Result of loading a checkpoint; as text a summary for people."""

    layout: Layout
    loaded: tuple[str, ...]
    """The model's weights that were taken as they are."""
    expected_gaps: tuple[str, ...]
    """The model's weights that kept their values: the projection to the joint space when one tower
    is loaded, and the norm inside the attention when it comes from pretraining."""
    resized: tuple[str, ...]
    """The model's weights taken after resizing; not in `loaded`."""
    unexpected: tuple[str, ...]
    """EVA-CLIP's names of what the model has no place for; empty unless they were allowed."""
    ignored: tuple[str, ...]
    """The checkpoint's own names of what is known to be of no use: RoPE tables (recomputed),
    pretraining heads, the tower and the projection that were not asked for."""

    def __str__(self) -> str:
        lists = {
            "resized": self.resized,
            "kept at the model's values": self.expected_gaps,
            "unexpected": self.unexpected,
            "of no use": self.ignored,
        }
        said = [f"{what}: {_name_some(keys)}" for what, keys in lists.items() if keys]
        return f"{self.layout} layout; " + "; ".join([f"{len(self.loaded)} loaded", *said])


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's weights as one safetensors file, never seen half-written, in their dtype and
    under the released checkpoints' names and shapes. The model may be inside torch.compile,
    DataParallel or DistributedDataParallel; or sharded by FSDP2, when every rank must call and rank
    0 alone writes. Raises InputError: another suffix, or as `unwrap_model`; OSError: a full disk.
    """
    if tensors := released_tensors(model):
        write_weights(tensors, Path(path))


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write `config.json`, `model.safetensors` and `preprocessing.json`, none of them in halves, of
    a model that may be wrapped or sharded, as `save_weights` says."""
    config = unwrap_model(model).config
    if not (tensors := released_tensors(model)):
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(tensors, folder / WEIGHTS_FILE)
    used = describe_preprocessing(config.vision.image_px)
    write_atomically(folder / PREPROCESSING_FILE, json.dumps(used, indent=1) + "\n")
    write_atomically(folder / CONFIG_FILE, config.model_dump_json(indent=1) + "\n")


def unwrap_model(model: nn.Module) -> EvaClip:
    """Return the EvaClip inside torch.compile or a wrapper that holds it as `module`; raises
    InputError if there is none, or its weights lie in pieces that only the wrapper can join."""
    inner: object = model
    while not isinstance(inner, EvaClip):
        holder, inner = inner, getattr(inner, "_orig_mod", getattr(inner, "module", None))
        if not isinstance(inner, nn.Module):
            raise InputError(f"{type(holder).__name__} holds no EvaClip: give the model itself")
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in (model, *model.modules())):
        raise InputError(
            "FullyShardedDataParallel (FSDP1) keeps the weights in flat pieces: save inside its "
            "summon_full_params, or shard with fully_shard (FSDP2)"
        )
    if any(hasattr(parameter, "ds_id") for parameter in inner.parameters()):
        raise InputError(
            "DeepSpeed ZeRO stage 3 keeps the weights in pieces: save a model inside "
            "deepspeed.zero.GatheredParameters, or train with stage 0 to 2"
        )
    return inner


def released_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by name, as the released files have them and without copies: [...] of the
    parameter's shape and dtype, `logit_scale` and `logit_bias` []. A parametrised weight is the sum
    that it stands for. Those that FSDP2 sharded are gathered, one by one, on the CPU of rank 0:
    every rank must call, and the others get none. Raises as `unwrap_model`."""
    inside = unwrap_model(model)
    state = dict(inside.state_dict(keep_vars=True))
    for path, module in inside.named_modules():
        for leaf in getattr(module, "parametrizations", ()):  # LoRA's updates, merged
            state[f"{path}.{leaf}"] = getattr(module, leaf)
    tensors = {
        plain_name(name): value.detach()
        for name, value in state.items()
        if ".parametrizations." not in name
    }
    if any(_is_sharded(value) for value in tensors.values()):
        is_first = torch.distributed.get_rank() == 0
        for name, value in tensors.items():
            whole = value.full_tensor() if _is_sharded(value) else value  # type: ignore[operator]
            tensors[name] = whole.cpu() if is_first else whole.new_empty(0)
        if not is_first:
            return {}
    return tensors | {name: tensors[name].reshape(()) for name in SCALARS if name in tensors}


def _is_sharded(value: Tensor) -> bool:
    """Return whether it is a DTensor, without importing its module, which takes a second."""
    return hasattr(value, "full_tensor")


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors [...] of any shapes, on any device, as `save_weights` does; same errors."""
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: weights are written as safetensors; end the name in it")
    plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
    # A name without a process id: what a killed run left is written over, not kept with the model.
    hidden = path.with_name(f".{path.name}")
    with replace_file(path, beside=hidden, sync=False) as beside:  # write_tensors syncs
        write_tensors(plain, beside, metadata={"format": "pt"})


@torch.no_grad()
def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    part: Part = "all",
    allow_unexpected: bool = False,
    allow_torchscript: bool = False,
) -> LoadReport:
    """Give a model, or one of its towers, the weights of a checkpoint of any known layout.

    A tower alone leaves the joint space as it is (`_JOINT`), as in the authors' initialisation.
    The text tower computes exact GELU also with OpenAI's weights, which QuickGELU was trained with.

    Args:
        model: changed in place; untouched when names, shapes or types do not fit. It may be
            wrapped as `save_weights` says, but not sharded.
        path: a file or folder as `open_tensors` takes it.
        allow_unexpected: leave out weights that the model has no place for, and report them.
        allow_torchscript: open OpenAI's TorchScript archives, which hold code.

    Raises InputError: an unreadable file, an unknown layout, nothing that matches, a missing or
    unexpected weight, another shape, integers, values that are not finite.
    """
    path = Path(path)
    state = unwrap_model(model).state_dict()
    wanted = {plain_name(name): value for name, value in state.items()}
    if any(_is_sharded(value) for value in wanted.values()):
        raise InputError("the model is sharded by FSDP2: load its weights before fully_shard")
    shapes = {key: value.shape for key, value in wanted.items()}
    stored = open_tensors(path, shapes=shapes, allow_torchscript=allow_torchscript)
    names = native_names(stored, where=str(path))
    asked = [entry for entry in names.entries if _is_asked(entry.native, part)]
    if any(entry.native == LOGIT_BIAS for entry in asked) and LOGIT_BIAS not in wanted:
        bias = torch.full_like(wanted["logit_scale"], INITIAL_LOGIT_BIAS)
        unwrap_model(model).logit_bias = nn.Parameter(bias)
        wanted[LOGIT_BIAS] = bias
    unexpected = [entry.native for entry in asked if entry.native not in wanted]
    chosen = {entry.native: entry for entry in asked if entry.native in wanted}
    _require_something(chosen, names, part, path)
    if unexpected and not allow_unexpected:
        raise InputError(
            f"{path} holds {_name_some(unexpected)}, for which this architecture has no place: "
            "choose the architecture it is of, or allow_unexpected to leave that out"
        )
    gaps = _expected_gaps(wanted, chosen, names.layout, part, path)
    resized = [
        key for key, entry in chosen.items() if _needs_resizing(entry, stored, wanted[key], path)
    ]
    for key, entry in chosen.items():
        _fill_tensor(wanted[key], entry, stored)
        if not all(bound.isfinite() for bound in torch.aminmax(wanted[key])):
            raise InputError(
                f"{path}: '{key}' has values that are not finite in "
                f"{_plain_dtype(wanted[key].dtype)}: take a checkpoint from before training "
                "diverged, or load in another precision"
            )
    left = (entry.sources for entry in names.entries if not _is_asked(entry.native, part))
    return LoadReport(
        layout=names.layout,
        loaded=tuple(key for key in chosen if key not in resized),
        expected_gaps=gaps,
        resized=tuple(resized),
        unexpected=tuple(unexpected),
        ignored=(*names.ignored, *chain.from_iterable(left)),
    )


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Resize [1, 1 + n * n, W] to [1, 1 + grid * grid, W] as `resize_bicubic`; the class token's
    row stays."""
    old = math.isqrt(table.shape[1] - 1)
    image = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, W, n, n]
    image = resize_bicubic(image, grid)
    return torch.cat((table[:, :1], image.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def resize_text_positions(table: Tensor, length: int) -> Tensor:
    """Resize [n, W] to [length, W]: cut, or stretched in a line behind the first 20 rows."""
    old = table.shape[0]
    if length <= old:
        return table[:length]
    kept = min(_TRAINED_POSITIONS, old - 1)
    rest = F.interpolate(table[kept:].t()[None], length - kept, mode="linear", align_corners=True)
    return torch.cat((table[:kept], rest[0].t()))


def resize_bicubic(image: Tensor, size: int) -> Tensor:
    """Resize [N, C, n, n] to [N, C, size, size], without antialiasing, in at least float32; the
    dtype stays."""
    return F.interpolate(to_float32(image), size=(size, size), mode="bicubic").to(image.dtype)


def _is_asked(native: str, part: Part) -> bool:
    """Return whether a weight is to be loaded; one of no tower is, so that it is seen."""
    if part == "all":
        return True
    other = _PREFIX["text" if part == "vision" else "vision"]
    return not native.startswith((other, *_JOINT))


def _require_something(chosen: Mapping[str, Entry], names: Names, part: Part, path: Path) -> None:
    towers = [name for name, start in _PREFIX.items() if any(k.startswith(start) for k in chosen)]
    if not towers or (part != "all" and part not in towers):
        what = "an EVA-CLIP model" if part == "all" else f"a {part} tower"
        raise InputError(
            f"{path} ({names.layout} layout) holds no weights of {what}: none of its keys match "
            "this architecture"
        )
    if part == "all" and len(towers) == 1:
        other = "text" if towers == ["vision"] else "vision"
        raise InputError(
            f"{path} ({names.layout} layout) holds no {other} tower that matches: load the tower "
            f"it has with part='{towers[0]}', in a recipe as initialise.{towers[0]}"
        )


def _expected_gaps(
    wanted: Iterable[str], chosen: Mapping[str, Entry], layout: Layout, part: Part, path: Path
) -> tuple[str, ...]:
    """The weights that such a checkpoint does not decide; raises InputError for others."""
    prefix = "" if part == "all" else _PREFIX[part]
    absent = [key for key in wanted if key not in chosen and key.startswith(prefix)]
    gaps = [key for key in absent if key.startswith(_JOINT) or may_lack(layout, key)]
    if part == "all":
        gaps = []
    if missing := [key for key in absent if key not in gaps]:
        raise InputError(
            f"{path} lacks {_name_some(missing)} of this architecture: choose the architecture "
            "it is of, or download it again"
        )
    return tuple(gaps)


def _needs_resizing(
    entry: Entry, stored: Mapping[str, StoredTensor], target: Tensor, path: Path
) -> bool:
    """Return whether a weight fits only after resizing; raises InputError if not even then."""
    for source in entry.sources:
        if stored[source].dtype not in _NUMBERS:
            raise InputError(
                f"{path}: '{source}' has {_plain_dtype(stored[source].dtype)} values where "
                "fp64, fp32, fp16 or bf16 is expected: give unquantised weights"
            )
    shapes = {source: stored[source].shape for source in entry.sources}
    is_scalar = entry.join != "same" and not all(shapes.values())  # of a forged file
    shape = () if is_scalar else entry.native_shape(shapes)
    if shape == target.shape or (entry.native in SCALARS and math.prod(shape) == 1):
        return False
    match entry.native, shape:
        case "visual.pos_embed", (1, rows, width):
            is_square = rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1
            fits = is_square and width == target.shape[-1]
        case "text.positional_embedding", (_, width):
            fits = width == target.shape[-1]
        case "visual.patch_embed.proj.weight", (*before, height, width):
            fits = height == width and before == list(target.shape[:2])
        case _:
            fits = False
    if fits:
        return True
    raise InputError(
        f"{path}: '{entry.native}' has shape {list(shape)}, but the model needs "
        f"{list(target.shape)}: it is of another architecture"
    )


def _fill_tensor(target: Tensor, entry: Entry, stored: Mapping[str, StoredTensor]) -> None:
    if entry.join == "same" and stored[entry.sources[0]].shape.numel() == target.numel():
        stored[entry.sources[0]].copy_to(target)
        return
    value = entry.join_sources({source: stored[source].read() for source in entry.sources})
    match entry.native:
        case "visual.pos_embed":
            value = resize_positions(to_float32(value), math.isqrt(target.shape[1] - 1))
        case "text.positional_embedding":
            value = resize_text_positions(to_float32(value), target.shape[0])
        case "visual.patch_embed.proj.weight":
            value = resize_bicubic(to_float32(value), target.shape[-1])
    target.copy_(value)


def _name_some(keys: Iterable[str]) -> str:
    first, *more = keys
    return f"'{first}'" + (f" and {len(more)} more" if more else "")


def _plain_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
