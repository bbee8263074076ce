"""torchvision, importable beside a CPU build of torch too.

Covers: the operators that the package index's build, compiled for CUDA, describes and cannot load
beside such a torch.
Not here: the operators themselves; nothing here uses one.
"""

import torch

__all__ = ["torchvision"]

try:
    import torchvision
except RuntimeError:  # "operator torchvision::nms does not exist"
    _OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # they go when it does
    for _name in ("nms", "qnms"):
        _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
