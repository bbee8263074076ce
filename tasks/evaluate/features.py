"""Image features of a set, computed in blocks that survive a kill.

Covers: decoding and encoding every image of a set once, the files finished blocks lie in.
Not here: ranks and figures; text features, which take seconds.

A block is a fixed range of samples, always encoded in the same batches, so an evaluation that was
killed and continued has bitwise the features of one that was not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evaclip_model.errors import InputError
from evaclip_model.transform import UnreadableImageError, decode_image
from evaclip_model.zeroshot import normalised
from tasks.evaluate.sets import EvalSample, EvalSet

BLOCK_BATCHES = 4
"""Batches in one block; a kill costs at most one block."""


class ImageTower(Protocol):
    """What is needed of a model here."""

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor: ...


class _Images(Dataset[Tensor | UnreadableImageError]):
    """Samples as normalised model input [3, H, W].

    A reason not to decode is returned, not raised: a DataLoader wraps what a worker raises in the
    worker's traceback, and the user is owed a sentence.
    """

    def __init__(self, samples: tuple[EvalSample, ...], transform: Callable[..., Tensor]) -> None:
        self._samples = samples
        self._transform = transform

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Tensor | UnreadableImageError:
        sample = self._samples[index]
        try:
            return self._transform(decode_image(sample.image.read()))
        except UnreadableImageError as error:
            return UnreadableImageError(f"{sample.image.tar}: image {sample.key}: {error}")


def _stacked(images: list[Tensor | UnreadableImageError]) -> Tensor | UnreadableImageError:
    """Model input [B, 3, H, W], or why the first of the undecodable ones is."""
    failed = next((one for one in images if isinstance(one, UnreadableImageError)), None)
    return failed or torch.stack([one for one in images if isinstance(one, Tensor)])


def image_features(
    model: ImageTower,
    transform: Callable[..., Tensor],
    evalset: EvalSet,
    blocks: Path,
    *,
    batch_size: int,
    workers: int = 0,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Normalised fp32 features of all images [N, D], in the order of the set.

    `blocks` holds the finished blocks of this very model and set; the caller names it after both.
    `progress` gets the number of images done.

    Raises:
        InputError: an image cannot be decoded, or features are not finite.
    """
    blocks.mkdir(parents=True, exist_ok=True)
    size = batch_size * BLOCK_BATCHES
    parts: list[Tensor] = []
    done = 0
    for start in range(0, len(evalset), size):
        samples = evalset.samples[start : start + size]
        path = blocks / f"{start:09d}-{len(samples)}.safetensors"
        part = _read_block(path, len(samples))
        if part is None:
            images = DataLoader(
                _Images(samples, transform), batch_size, num_workers=workers, collate_fn=_stacked
            )
            batches: list[Tensor] = []
            for batch in images:
                if isinstance(batch, UnreadableImageError):
                    raise InputError(
                        f"{batch}; every image of a set is evaluated or none, so fetch or write "
                        "this set again"
                    )
                batches.append(encode_batch(model, batch, device))
                progress(done + sum(len(features) for features in batches))
            part = torch.cat(batches)
            _write_block(path, part)
        parts.append(part)
        done += len(part)
        progress(done)
    features = torch.cat(parts)
    if len(features) != len(evalset):
        raise RuntimeError(
            f"set '{evalset.name}': {len(features)} images evaluated, {len(evalset)} in its index"
        )
    return features


def encode_batch(model: ImageTower, images: Tensor, device: str) -> Tensor:
    """Normalised fp32 features [B, D] of model input [B, 3, H, W], on the CPU."""
    with torch.inference_mode():
        return normalised(model.encode_image(images.to(device)).cpu(), "image")


def _read_block(path: Path, rows: int) -> Tensor | None:
    try:
        features = load_file(path)["features"]
    except (FileNotFoundError, KeyError, SafetensorError):
        return None
    return features if len(features) == rows else None


def _write_block(path: Path, features: Tensor) -> None:
    beside = path.with_suffix(".part")
    save_file({"features": features.contiguous()}, beside)
    beside.replace(path)
