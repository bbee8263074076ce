"""Features that a teacher made of the crops and captions of a training stream, by position: files
`000000.npy` of whole steps, [samples, 2, D] in half precision, of images and of captions."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaclip_model.errors import InputError

FILE_SAMPLES = 1 << 14
"""Of a file, unless a single step has more."""


def steps_in_file(global_batch: int) -> int:
    """Steps that a file holds; the last one may hold fewer."""
    return max(1, FILE_SAMPLES // global_batch)


def stream_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npy"


def read_features(folder: Path, positions: Tensor, global_batch: int) -> Tensor:
    """[b, 2, D] half precision, of the samples at `positions` [b], all of one step of the stream.
    Raises InputError: they are not there."""
    samples = steps_in_file(global_batch) * global_batch
    path = stream_file(folder, int(positions[0]) // samples)
    try:
        held = np.load(path, mmap_mode="r", allow_pickle=False)
        return torch.from_numpy(held[positions.numpy() % samples])
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path} has no features of this stage's samples ({error})") from None
