"""open_clip, timm and transformers, importable beside a CPU build of torch too.

Covers: importing them after the torchvision that all import.
Not here: how that one is made importable (peer_torchvision.py).
"""

from tests.evaclip_model.peer_torchvision import torchvision  # noqa: F401, I001

import open_clip
import timm
import transformers

__all__ = ["open_clip", "timm", "transformers"]
