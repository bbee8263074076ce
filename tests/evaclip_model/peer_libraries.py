"""open_clip, timm and transformers, importable beside a CPU build of torch too.

Covers: the torchvision that all import. The one of the package index is compiled for CUDA; beside
a CPU build of torch its operators do not load, and its import fails at the first it describes.
Not here: the operators themselves; no EVA-CLIP uses one.
"""

import torch

__all__ = ["open_clip", "timm", "transformers"]

try:
    import torchvision  # noqa: F401
except RuntimeError:  # "operator torchvision::nms does not exist"
    _OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # they go when it does
    for _name in ("nms", "qnms"):
        _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip
import timm
import transformers
