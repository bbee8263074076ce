"""What decides a training run: its settings, and the job file the trainer reads.

Covers: `TrainConfig` (one training stage of a recipe) and `TrainJob` (`train.json`).
Not here: how any of it is done; where it runs (number of ranks, threads), which is an argument.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from evaclip_model.config import Config

JOB_FILE = "train.json"
METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
ERROR_FILE = "error.txt"
RESUMABLE_FILE = "resumable"
CHECKPOINTS = "checkpoints"
MODEL_FOLDER = "model"
SHARD_CACHE = "shard-cache"


class TrainConfig(Config):
    """One training stage; defaults as the paper's EVA-02-CLIP-B/16 (Table 8) where it has one."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name of the training stage."""
    image_px: int = Field(gt=0)
    """Side of the square training images, pixels; must be a multiple of the model's patch."""
    samples_seen: int = Field(gt=0)
    """Image-text pairs to train on, repeats counted; rounded up to whole global batches."""
    global_batch: int = Field(gt=1)
    """Image-text pairs in one optimizer step, over all ranks: each is contrasted with all."""
    optimizer: Literal["lamb", "adamw"] = "lamb"
    """Update rule; LAMB scales each parameter's step by the ratio of its norm to its update's."""
    lr_vision: float = Field(default=2e-4, ge=0)
    """Peak learning rate of the vision tower's last layer."""
    lr_text: float = Field(default=2e-5, ge=0)
    """Peak learning rate of the text tower's last layer."""
    lr_other: float = Field(default=5e-4, ge=0)
    """Peak learning rate of what belongs to no tower: the logit scale."""
    layer_decay_vision: float = Field(default=0.75, gt=0, le=1)
    """Factor on the vision learning rate for each layer further from the output; 1 is off."""
    layer_decay_text: float = Field(default=0.75, gt=0, le=1)
    """Factor on the text learning rate for each layer further from the output; 1 is off."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled decay of matrices and embeddings; biases, norms and positions have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running mean of gradients."""
    beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay of the running mean of squared gradients."""
    eps: float = Field(default=1e-6, gt=0)
    """Added to the root of the second moment."""
    grad_clip_norm: float | None = Field(default=5.0, gt=0)
    """Largest norm of the whole gradient, in the loss's units; none switches clipping off."""
    warmup_steps: int = Field(default=2000, ge=0)
    """Optimizer steps of linear warm-up."""
    schedule: Literal["cosine"] = "cosine"
    """Shape of the learning rate after warm-up: half a cosine down to 0."""
    patch_dropout: float = Field(default=0.5, ge=0, lt=1)
    """Share of image patches masked out in training (FLIP); 0 keeps all."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of weights and activations; masters and optimizer states are fp32 always."""
    trust_scope: Literal["parameter", "partition"] = "parameter"
    """What one LAMB trust ratio covers. "partition" (a rank's slice of a group, as the authors' run
    had it) makes the result depend on the number of ranks."""
    trust_clip: tuple[float, float] | None = (0.01, 10.0)
    """Bounds of LAMB's trust ratio; the lower one lets a near-zero projection head grow."""
    adapt_no_decay: bool = False
    """Whether LAMB adapts parameters without weight decay too (biases, norms, logit scale)."""
    grad_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass. "full" keeps only each block's input: a third of
    the memory for 30 % more time; "selective" keeps the results of matrix products too: two thirds
    for 4 % (fp32) to 20 % (bf16)."""
    zero_stage: Literal[1, 2] = 1
    """DeepSpeed ZeRO: 1 shards optimizer states over ranks, 2 gradients too."""
    source_weights: dict[str, float] = Field(default_factory=dict)
    """Source name -> share of the draws, any scale; empty: in proportion to their samples."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest area of the random crop, as a share of the image's."""
    caption_templates: tuple[str, ...] = Field(default=("{}",), min_length=1)
    """Texts around the caption, one of them drawn for every sample; `{}` stands for the caption."""
    caption_separator: str | None = Field(default=None, min_length=1)
    """Where a caption may be cut: a random number of its parts, from the first on, is kept, so that
    a title is learnt with and without the tags behind it. None keeps captions whole."""
    decode: Literal["fast", "reference"] = "fast"
    """How images become pixels. "reference" is the authors' transform to the bit; "fast" takes less
    than half its time on JPEGs, within 2 levels of 255 of it, and is the same on all else."""
    sampling: Literal["exact", "resampled"] = "exact"
    """Order of a source. "exact" shows every sample once before any again; "resampled" draws whole
    shards with replacement, as the authors' runs did."""
    lanes: int = Field(default=16, gt=0)
    """Parallel sample streams; every rank reads whole lanes, so ranks must divide this number."""
    shuffle_buffer: int = Field(default=1000, gt=0)
    """Samples of one lane and source that are shuffled together."""
    checkpoint_every_steps: int = Field(default=500, gt=0)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints kept on disk."""
    seed: int = Field(default=4096, ge=0)
    """Decides order, crops, masks and templates, each by the sample's position alone."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return math.ceil(self.samples_seen / self.global_batch)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.global_batch % self.lanes:
            raise ValueError(
                f"global_batch = {self.global_batch} must be a multiple of lanes = {self.lanes}"
            )
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale = [{low}, {high}] must rise and lie within 0 and 1")
        if self.trust_clip is not None and not 0 <= self.trust_clip[0] <= self.trust_clip[1]:
            raise ValueError("trust_clip must be two rising numbers, not below 0")
        for template in self.caption_templates:
            if template.count("{}") != 1:
                raise ValueError(f"caption template '{template}' must contain {{}} exactly once")
        if any(weight <= 0 for weight in self.source_weights.values()):
            raise ValueError("source_weights must be above 0; leave a source out to not draw it")
        return self


class TrainJob(Config):
    """`train.json`: everything a rank needs to know."""

    train: TrainConfig
    start_from: Path
    """Folder of the model to start from (config.json, model.safetensors)."""
    shards: Path | str
    """Manifest of the training shards, `shards.json`: a path, or a URL that fsspec knows. The
    shards lie where it lies."""
    run_dir: Path
    """Where metrics, checkpoints and the finished model go."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """What steps the optimizer; "torch" is for one rank in fp32 only, and quicker to start."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads of each rank; none leaves torch's choice."""
    cache_bytes: int = Field(default=2 * 2**30, ge=0)
    """Memory each rank may fill with decoded images; 0 decodes every time."""
    read_workers: int = Field(default=0, ge=0)
    """Processes of each rank that read and decode ahead; 0 leaves it to a thread of the rank. Fewer
    are started when the rank's lanes cannot be shared evenly."""
    shard_cache: Path | None = None
    """Folder for shards that are fetched from a URL; none: in the run's folder."""
    shard_cache_bytes: int = Field(default=32 * 2**30, ge=0)
    """Room for fetched shards, of each rank."""
