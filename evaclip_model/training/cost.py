"""What training costs, before anything is built: FLOPs, parameters, memory of a GPU.

Covers: pure functions of an architecture and of a training stage's settings; rates of GPUs.
Not here: measuring any of it (trainer.py), prices and days (flows). Does not import torch.

A FLOP is half a multiply-add of a matrix product; norms, activations and the loss are not counted.
"""

from __future__ import annotations

import re

from evaclip_model.model_config import ModelConfig, TextConfig, VisionConfig

PACKED_TEXT_TOKENS = 20.0
"""Tokens of a web caption with its start and end, on average; what packing computes of 77."""
BACKWARD_PASSES = 2
"""Forward passes that a backward pass is worth: gradients of inputs, and of weights."""

BF16_PEAKS: tuple[tuple[str, float], ...] = (
    ("A100", 312e12),
    ("A800", 312e12),
    ("A30", 165e12),
    ("A40", 149.7e12),
    ("A10", 125e12),
    ("L4", 121e12),
    ("L40", 181e12),
    ("L40S", 362e12),
    ("H100", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H800", 989e12),
    ("H200", 989e12),
    ("H200 NVL", 835e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
)
"""Words of a GPU's name -> dense bf16 FLOPs a second of its tensor cores; see `peak_flops`."""


def train_flops_per_sample(
    config: ModelConfig, *, patch_dropout: float, text_tokens: float
) -> float:
    """FLOPs of forward and backward pass for one image-text pair, nothing computed twice.

    Every block counts all its tokens, and causal attention as if it were dense, as figures of other
    trainers do; so a model that leaves such work out reports more than it computes.

    Args:
        patch_dropout: share of the image's patches that is masked out, in [0, 1).
        text_tokens: tokens of the caption that are computed: 77 padded, about 20 packed.
    """
    forward = image_flops(config, patch_dropout) + text_flops(config, text_tokens)
    return forward * (1 + BACKWARD_PASSES)


def image_flops(config: ModelConfig, patch_dropout: float = 0.0) -> float:
    """FLOPs of the image tower's forward pass, with `patch_dropout` of the patches left out."""
    vision = config.vision
    patches = vision.num_patches * (1 - patch_dropout)
    embed = patches * 3 * vision.patch_px**2 * vision.width
    matrices = 4 * vision.width**2 + _mlp_matrices(vision)
    blocks = vision.layers * _block_products(1 + patches, vision.width, matrices)
    return 2 * (embed + blocks + vision.width * config.embed_dim)


def text_flops(config: ModelConfig, text_tokens: float) -> float:
    """FLOPs of the text tower's forward pass over `text_tokens` tokens of one caption."""
    text = config.text
    blocks = text.layers * _block_products(text_tokens, text.width, 12 * text.width**2)
    return 2 * (blocks + text.width * config.embed_dim)


def _block_products(tokens: float, width: int, matrices: int) -> float:
    """Multiply-adds of one block: its weights on every token, and attention of all to all."""
    return tokens * matrices + 2 * tokens**2 * width


def _mlp_matrices(vision: VisionConfig) -> int:
    """Weights of the image tower's MLP without biases and norms."""
    return (3 if vision.mlp == "swiglu" else 2) * vision.width * vision.mlp_width


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOPs a second of a GPU at its boost clock; none if its name is not known.

    Args:
        device_name: as the driver says it ("NVIDIA A100-SXM4-40GB"), or a part of it ("A100").
            Names mean the SXM form unless they say PCIe or NVL. All words of a known name must
            be among its words; the most words win.

    Source: NVIDIA's data sheets of each product, halved where they give sparse figures; fp16 is
    as fast. What a run reaches is a third to a half of it.
    """
    words = _words(device_name)
    known = [(len(_words(name)), peak) for name, peak in BF16_PEAKS if _words(name) <= words]
    return max(known)[1] if known else None


def _words(name: str) -> frozenset[str]:
    return frozenset(re.split(r"[\s_-]+", name.lower()))


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by tower: "vision", "text", and "other", the logit scale."""
    return {
        "vision": _vision_parameters(config.vision, config.embed_dim),
        "text": _text_parameters(config.text, config.embed_dim),
        "other": 1,
    }


def _vision_parameters(vision: VisionConfig, embed_dim: int) -> int:
    width, hidden = vision.width, vision.mlp_width
    norm = 2 * width
    embed = (3 * vision.patch_px**2 + 1) * width + (2 + vision.num_patches) * width
    attention = 4 * width**2 + 3 * width + (norm if vision.sub_norm else 0)
    biases = (2 * hidden if vision.mlp == "swiglu" else hidden) + width
    mlp = _mlp_matrices(vision) + biases + (2 * hidden if vision.sub_norm else 0)
    scales = 2 * width if vision.layer_scale_init is not None else 0
    block = attention + mlp + 2 * norm + scales
    return embed + vision.layers * block + norm + (width + 1) * embed_dim


def _text_parameters(text: TextConfig, embed_dim: int) -> int:
    width = text.width
    block = 12 * width**2 + 13 * width
    embed = (text.vocab_size + text.context_length) * width
    return embed + text.layers * block + 2 * width + width * embed_dim
