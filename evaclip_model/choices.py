"""Choices that functions, configs and command lines share: precision, gradient checkpointing, and
the form a model is written in. Does not import torch, so that command lines start without it."""

from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
GradCheckpointing = Literal["none", "selective", "full"]
"""Activations that the backward pass computes again; see `layers.run_block`."""
Library = Literal["native", "open_clip", "timm", "transformers"]
"""native: this package's own and the released files' names. open_clip: both towers. timm: the
image tower with its head. transformers: the text tower as `CLIPTextModelWithProjection` has it;
EVA's image towers it opens in timm's form, through `TimmWrapperModel`."""
Form = Literal["native", "open_clip", "timm", "transformers", "onnx"]
"""A `Library`, or both towers as ONNX graphs."""
