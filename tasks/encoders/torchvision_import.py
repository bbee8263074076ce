"""Importing torchvision beside any build of torch.

The torchvision of the package index is compiled for CUDA. Beside a CPU build of torch its compiled
operators do not load, and its import fails at the first that it describes. No data set and no CLIP
uses one.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import torch

from evaclip_model.errors import InputError, shorten_error

_OPERATORS = ("nms", "qnms")
_kept: list[Any] = []  # described operators go when what described them does


def import_torchvision(module: str = "") -> ModuleType:
    """`torchvision`, or the module of this name in it. Raises ImportError: it is not installed;
    RuntimeError: it does not fit torch for another reason."""
    name = f"torchvision.{module}" if module else "torchvision"
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _kept:
            raise
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for one in _OPERATORS:
            library.define(f"{one}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        return importlib.import_module(name)


@contextmanager
def explain_import(library: str, needed: str) -> Iterator[None]:
    """The import of a library that looks for torchvision; an InputError says what is `needed`."""
    try:
        with suppress(ImportError):
            import_torchvision()
        yield
    except (ImportError, RuntimeError) as error:
        why = shorten_error(error)
        raise InputError(f"{library} cannot be imported ({why}): install {needed}") from error
