"""Tensors in a file: written through to the disk, or not left at all.

Covers: writing safetensors so that a full disk is an ordinary error and leaves no half file.
Not here: names and meaning of tensors (weights.py, checkpoint.py), reading.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to `path` and wait until they are on the disk.

    Raises:
        OSError: the disk is full, or refuses for another reason; `path` is gone then. safetensors
            itself raises an error that names the reason in its text only.
    """
    try:
        save_file(dict(tensors), path, metadata)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        reason = _SYSTEM_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
        if reason is None:
            raise
        number = int(reason[1])
        raise OSError(number, os.strerror(number), str(path)) from error
