"""Cost of a training before anything is built: FLOPs, parameters, memory of a GPU. Does not import
torch.

A FLOP is half a multiply-add of a matrix product; norms, activations and the loss are not counted.
"""

import json
import re
from importlib import resources

from evaclip_model.model.model_config import ModelConfig, VisionConfig
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine.deepspeed_config import LARGEST_BUCKET
from evaclip_model.training.loss.objective import make_objective

PACKED_TEXT_TOKENS = 20.0
"""Tokens of a web caption with its start and end, on average; what packing computes of 77."""

LIBRARIES_BYTES = 1.5 * 2**30
"""CUDA's context, the communication library's buffers, workspaces of matrix products."""

BF16_PEAKS: dict[str, float] = json.loads(
    (resources.files("evaclip_model.training") / "gpu_peaks.json").read_text()
)
"""Words of a GPU's name -> dense bf16 FLOPs a second of its tensor cores; see `peak_flops`."""


def train_flops_per_sample(
    config: ModelConfig, *, patch_dropout: float, text_tokens: float
) -> float:
    """FLOPs of forward and backward pass for one image-text pair, nothing computed twice, with
    `patch_dropout` of the patches left out; `text_tokens` are 77 padded, about 20 packed.

    Every block counts all its tokens, and causal attention as if it were dense, as figures of other
    trainers do; so a model that leaves such work out reports more than it computes.
    """
    forward = image_flops(config, patch_dropout) + text_flops(config, text_tokens)
    return forward * 3  # a backward pass is worth two: gradients of inputs, and of weights


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
    """Dense bf16 FLOPs a second of a GPU at its boost clock; none if its name is not known, as the
    driver says it ("NVIDIA A100-SXM4-40GB"), or a part of it. Names mean the SXM form unless they
    say PCIe or NVL. All words of a known name must be among its words; the most words win.

    Source: NVIDIA's data sheets of each product, halved where they give sparse figures; fp16 is
    as fast. What a run reaches is a third to a half of it.
    """
    words = _name_words(device_name)
    known = [
        (len(of_gpu), peak)
        for name, peak in BF16_PEAKS.items()
        if (of_gpu := _name_words(name)) <= words
    ]
    return max(known)[1] if known else None


def _name_words(name: str) -> frozenset[str]:
    return frozenset(re.split(r"[\s_-]+", name.lower()))


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by tower: "vision", "text", and "other", the logit scale."""
    counts = {"vision": 0, "text": 0, "other": 0}
    for name, count in count_parts(config).items():
        tower = name.partition(".")[0]
        counts[tower if tower in counts else "other"] += count
    return counts


def count_parts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, a block or what stands beside the blocks, as `TrainConfig.freeze` calls
    it."""
    text, width = config.text, config.text.width
    of_text = {
        "token_embedding": text.vocab_size * width,
        "positional_embedding": text.context_length * width,
        **{f"blocks.{index}": 12 * width**2 + 13 * width for index in range(text.layers)},
        "ln_final": 2 * width,
        "text_projection": width * config.embed_dim,
    }
    parts = {"vision": _vision_parts(config.vision, config.embed_dim), "text": of_text}
    named = {f"{tower}.{name}": n for tower, found in parts.items() for name, n in found.items()}
    return {**named, "logit_scale": 1}


def _vision_parts(vision: VisionConfig, embed_dim: int) -> dict[str, int]:
    width, hidden = vision.width, vision.mlp_width
    norm = 2 * width
    attention = 4 * width**2 + 3 * width + (norm if vision.sub_norm else 0)
    biases = (2 * hidden if vision.mlp == "swiglu" else hidden) + width
    mlp = _mlp_matrices(vision) + biases + (2 * hidden if vision.sub_norm else 0)
    scales = 2 * width if vision.layer_scale_init is not None else 0
    block = attention + mlp + 2 * norm + scales
    return {
        "patch_embed": (3 * vision.patch_px**2 + 1) * width,
        "cls_token": width,
        "pos_embed": (1 + vision.num_patches) * width,
        **{f"blocks.{index}": block for index in range(vision.layers)},
        "norm" if vision.pooling == "class_token" else "fc_norm": norm,
        "head": (width + 1) * embed_dim,
    }


def shown_tokens(train: TrainConfig) -> float:
    """Tokens of a web caption that a stage shows, on average, at most."""
    return min(PACKED_TEXT_TOKENS, train.text_tokens or PACKED_TEXT_TOKENS)


def pair_flops(config: ModelConfig) -> int:
    """FLOPs of the features of an image and a web caption."""
    return round(image_flops(config) + text_flops(config, PACKED_TEXT_TOKENS))


def stage_flops_per_sample(config: ModelConfig, train: TrainConfig, *, text_tokens: float) -> float:
    """`train_flops_per_sample`, averaged over a training stage's schedule of masking."""
    first, end = train.patch_dropout, train.patch_dropout_end
    last = first if end is None else end
    # FLOPs are a quadratic of the tokens, so Simpson's three values give a line's mean exactly.
    whole, begin, middle, final = (
        train_flops_per_sample(config, patch_dropout=share, text_tokens=text_tokens)
        for share in (0.0, first, (first + last) / 2, last)
    )
    unmasked = train.unmasked_final_share
    return unmasked * whole + (1 - unmasked) * (begin + 4 * middle + final) / 6


def gpu_memory(
    config: ModelConfig,
    train: TrainConfig,
    *,
    ranks: int,
    micro_batch: int,
    text_tokens: float = PACKED_TEXT_TOKENS,
) -> dict[str, float]:
    """Bytes that a rank's GPU holds at the worst moment of a step, by what they are; `config` is
    the model at the stage's image size. Activations, of `micro_batch` pairs of the rank's share,
    are what blocks keep for their backward pass with a fused attention kernel."""
    counts = count_parts(config)
    parameters = sum(counts.values())
    # What is frozen inside a block is counted as trained.
    trained = sum(count for part, count in counts.items() if not train.is_frozen(part))
    wide = 4 if train.precision == "fp32" else 2
    shared = ranks if train.zero_stage > 0 else 1
    has_masters = train.zero_stage > 0 or train.precision != "fp32"
    share = -(-train.global_batch // ranks)
    features = 2 * 4 * config.embed_dim
    memory = {
        "weights": parameters * wide,
        "weights with updates": parameters * wide if train.lora else 0,  # at the most
        "gradients": trained * wide * (1 / ranks if train.zero_stage == 2 else 1 + 1 / shared),
        "optimizer": trained * (12 if has_masters else 8) / shared,
        # Sums of the parts' gradients are kept in fp32.
        "sum of gradients": trained * 4 / (ranks if train.zero_stage == 2 else 1)
        if micro_batch < share and wide == 2
        else 0,
        "average of weights": trained * 4 / shared if train.ema_decay is not None else 0,
        "buckets": min(parameters, LARGEST_BUCKET) * wide,
        "activations": micro_batch * _count_activations(config, train, text_tokens) * wide,
        "pixels": micro_batch * 3 * config.vision.image_px**2 * (1 + wide),
        # Of the share and of all ranks' shares, each with its gradient.
        "features": 2 * features * (share + train.global_batch),
        "loss": make_objective(train).gpu_bytes(share, train.global_batch),
        "CUDA and libraries": LIBRARIES_BYTES,
    }
    return {what: size for what, size in memory.items() if size}


def _count_activations(config: ModelConfig, train: TrainConfig, text_tokens: float) -> float:
    """Numbers kept of one image-text pair: what every block holds until the backward pass reaches
    it, and what the one block of images at work has besides."""
    vision, text = config.vision, config.text
    is_whole = train.unmasked_final_share > 0
    least = 0.0 if is_whole else min(train.patch_dropout, train.patch_dropout_end or 1.0)
    image_tokens = 1 + vision.num_patches * (1 - least)
    swiglu, sub_norm = vision.mlp == "swiglu", int(vision.sub_norm)
    gains = 2 if vision.layer_scale_init is not None else 0
    # Of the stream: before and behind both norms, queries, keys, values, what attention gives, its
    # norm, what gains are multiplied with. Inside the MLP: GELU's input and output, or both
    # products, the gate, what they make, its norm.
    kept = (8 + sub_norm + gains) * vision.width
    kept += (4 + sub_norm if swiglu else 2) * vision.mlp_width
    # The block's input, and results of its matrix products and its attention.
    products = 7 * vision.width + (2 if swiglu else 1) * vision.mlp_width
    mode = train.grad_checkpointing
    held = {"none": kept, "selective": products, "full": vision.width}[mode]
    held_of_text = {"none": 16, "selective": 11, "full": 1}[mode] * text.width
    # Gradients inside the block take an MLP's width beyond what it has let go of by then.
    at_once = kept - held + vision.mlp_width
    of_image = image_tokens * (vision.layers * held + at_once)
    return of_image + text_tokens * text.layers * held_of_text
