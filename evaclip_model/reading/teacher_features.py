"""Features that a teacher made of the crops and captions of a training stream, by position.

A file, `000000.npy`, is [samples, 2, D] in half precision, of images and of captions: of some whole
steps, or where a step has more than a file should hold, of the first, second, ... of equal groups
of its lanes, so that whoever makes it never has a large global batch in memory.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.reading.config import SamplingConfig

FILE_SAMPLES = 1 << 13
"""Of a file at most, unless a lane has more in a step."""


def split_stream(stream: SamplingConfig) -> tuple[int, int]:
    """(steps in a file, groups of lanes): file n has group `n % groups`, of so many steps from the
    `n // groups * steps`-th on."""
    lanes, batch = stream.lanes, stream.global_batch
    fitting = (n for n in range(1, lanes) if lanes % n == 0 and batch // n <= FILE_SAMPLES)
    return max(1, FILE_SAMPLES // batch), next(fitting, lanes)


def file_sizes(stream: SamplingConfig, stage_steps: int) -> dict[int, int]:
    """Samples of every file of a stage, by its number."""
    steps, groups = split_stream(stream)
    share = stream.global_batch // groups
    numbers = range(-(-stage_steps // steps) * groups)
    return {one: min(steps, stage_steps - one // groups * steps) * share for one in numbers}


def stream_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npy"


def read_features(folder: Path, positions: Tensor, stream: SamplingConfig) -> Tensor:
    """[b, 2, D] half precision, of the samples at rising `positions` [b], all of one step. Raises
    InputError: they are not there."""
    steps, groups = split_stream(stream)
    share, step = stream.global_batch // groups, int(positions[0]) // stream.global_batch
    places = positions.numpy() % stream.global_batch
    found = []
    for group in range(places[0] // share, places[-1] // share + 1):
        path = stream_file(folder, step // steps * groups + group)
        rows = places[places // share == group] % share + step % steps * share
        try:
            found.append(np.load(path, mmap_mode="r", allow_pickle=False)[rows])
        except (OSError, ValueError, IndexError) as error:
            raise InputError(
                f"{path} has no features of this stage's samples in step {step + 1:,} ({error}): "
                "run its stage 'teach' again"
            ) from None
    return torch.from_numpy(np.concatenate(found))
