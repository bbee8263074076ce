"""Weights on disk: saving a model, opening it, and starting from somebody else's.

Covers: this project's folder format; the released and the pretraining layouts with EVA-CLIP's own
names; resizing what depends on the image or patch size.
Not here: a saved folder as a model (create.py); layouts with other names (transformers, timm);
training state (checkpoint.py).

Position tables are resized bicubically without antialiasing, as the released models were.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from evaclip_model.clip import EvaClip
from evaclip_model.errors import InputError
from evaclip_model.model_config import CONFIG_FILE
from evaclip_model.tensor_file import write_tensors

WEIGHTS_FILE = "model.safetensors"

Part = Literal["all", "vision", "text"]
_PREFIX = {"vision": "visual.", "text": "text."}
_MARK = {"vision": "patch_embed.proj.weight", "text": "token_embedding.weight"}
"""A key every tower of the kind has; without its prefix it shows a file of that tower alone."""
_JOINT = ("visual.head.", "text.text_projection", "logit_scale")
"""The joint space: it belongs to the pair of towers, so one tower's file does not decide it."""
_PRETRAINING = ("visual.mask_token", "visual.lm_head.")
"""What masked image modelling leaves in a vision file and CLIP has no use for."""
_OPENAI_SCALARS = ("text.input_resolution", "text.context_length", "text.vocab_size")


@dataclass(frozen=True)
class LoadReport:
    """What a file gave to a model; key names are the model's."""

    loaded: tuple[str, ...]
    """Taken as they are."""
    resized: tuple[str, ...]
    """Taken after resizing to the model's image or patch size; not in `loaded`."""
    kept: tuple[str, ...]
    """Left at the model's own values, because a file of this kind does not decide them."""
    ignored: tuple[str, ...]
    """In the file, without a use here: RoPE tables, pretraining heads, the other tower."""


def save_model(model: EvaClip, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`; neither is ever seen half-written.

    Tensors keep their dtype and have the names and shapes of the released checkpoints.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict(keep_vars=True).items()
    }
    tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    # Names without a process id: what a killed run left is written over, not kept with the model.
    beside = folder / f".{WEIGHTS_FILE}"
    write_tensors(tensors, beside, metadata={"format": "pt"})
    beside.replace(folder / WEIGHTS_FILE)
    beside = folder / f".{CONFIG_FILE}"
    with beside.open("w") as file:
        file.write(model.config.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / CONFIG_FILE)


def load_weights(model: EvaClip, path: str | Path, part: Part = "all") -> LoadReport:
    """Give a model the weights of a file, strictly: what does not fit is an error, never skipped.

    A tower alone (`part`) may come from a pretraining file with unprefixed names, or from a whole
    CLIP; in both cases its projection to the joint space and the temperature stay as they are.

    Args:
        model: changed in place; untouched when this raises.
        path: a saved model's folder, a .safetensors file, or a .pt file of plain tensors.
        part: which tower to load, or all of the model.

    Raises:
        InputError: unreadable file, nothing that matches, a missing or unknown key, another shape.
    """
    path = Path(path)
    found = _native_names(_read(path), part)
    wanted = model.state_dict()
    chosen: dict[str, Tensor] = {}
    resized: list[str] = []
    ignored: list[str] = []
    for key, value in found.items():
        if not _is_used(key, part):
            ignored.append(key)
            continue
        if key not in wanted:
            raise InputError(f"{path}: unknown tensor '{key}': it is no part of this architecture")
        fitted = _fit(key, value, wanted[key].shape, path)
        if fitted.shape != value.shape and key != "logit_scale":
            resized.append(key)
        chosen[key] = fitted
    if not chosen:
        what = "an EVA-CLIP model" if part == "all" else f"a {part} tower"
        raise InputError(f"{path} holds no weights of {what}: none of its keys match")
    missing = [key for key in wanted if key not in chosen and _is_due(key, part, found)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{path} lacks '{missing[0]}'{more}: it is of another architecture")
    model.load_state_dict(chosen, strict=False)
    return LoadReport(
        loaded=tuple(key for key in chosen if key not in resized),
        resized=tuple(resized),
        kept=tuple(key for key in wanted if key not in chosen),
        ignored=tuple(ignored),
    )


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Resize [1, 1 + n * n, W] to [1, 1 + grid * grid, W]; the class token's row stays.

    Bicubic, corners not aligned, no antialiasing, in at least float32.
    """
    old = math.isqrt(table.shape[1] - 1)
    if old == grid:
        return table
    first, patches = table[:, :1], table[:, 1:]
    image = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, W, n, n]
    image = _bicubic(image, grid)
    return torch.cat((first, image.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def resize_patch_kernel(kernel: Tensor, patch_px: int) -> Tensor:
    """Resize [W, 3, p, p] to [W, 3, patch_px, patch_px], bicubic as positions are."""
    return kernel if kernel.shape[-1] == patch_px else _bicubic(kernel, patch_px)


def _bicubic(image: Tensor, size: int) -> Tensor:
    wide = image.to(torch.promote_types(image.dtype, torch.float32))
    resized = F.interpolate(wide, size=(size, size), mode="bicubic", align_corners=False)
    return resized.to(image.dtype)


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a .safetensors or .pt file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as weights ({error})") from error
    except Exception as error:  # torch raises pickle's own errors for forbidden content
        raise InputError(f"{path} holds more than plain tensors and is not opened") from error
    for wrapper in ("model", "module", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    tensors = {
        str(key): value
        for key, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(value, Tensor)
    }
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _native_names(tensors: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
    """Prefix the keys of a file that holds one tower, or CLIP's unprefixed text tower."""
    if part == "vision" and _MARK["vision"] in tensors:
        return {_PREFIX["vision"] + key: value for key, value in tensors.items()}
    if _MARK["text"] in tensors:  # OpenAI's layout: the text tower has no prefix
        return {
            key if key.startswith("visual.") or key == "logit_scale" else _PREFIX["text"] + key: v
            for key, v in tensors.items()
        }
    return dict(tensors)


def _is_used(key: str, part: Part) -> bool:
    if "rope." in key or key.startswith((*_PRETRAINING, *_OPENAI_SCALARS)):
        return False
    if part == "all":
        return True
    return key.startswith(_PREFIX[part]) and not key.startswith(_JOINT)


def _is_due(key: str, part: Part, found: Mapping[str, Tensor]) -> bool:
    """Whether a file of this kind must have the key."""
    if part == "all":
        return True
    if not key.startswith(_PREFIX[part]) or key.startswith(_JOINT):
        return False
    # Masked image modelling ran without this norm; CLIP starts it at gain 1 and bias 0.
    is_pretraining = "visual.mask_token" in found or "visual.head.weight" not in found
    return not (".inner_attn_ln." in key and is_pretraining)


def _fit(key: str, value: Tensor, shape: torch.Size, path: Path) -> Tensor:
    if key == "logit_scale" and value.numel() == 1:
        return value.reshape(1)
    if value.shape == shape:
        return value
    fitted = value
    if key == "visual.pos_embed" and value.ndim == 3 and value.shape[-1] == shape[-1]:
        fitted = resize_positions(value, math.isqrt(shape[1] - 1))
    elif key == "visual.patch_embed.proj.weight" and value.ndim == 4:
        fitted = resize_patch_kernel(value, shape[-1])
    if fitted.shape != shape:
        raise InputError(
            f"{path}: '{key}' has shape {list(value.shape)}, but the model needs {list(shape)}: "
            "it is of another architecture"
        )
    return fitted
