"""Settings of a training stage (`TrainConfig`), and the job file that the trainer reads
(`TrainJob`, `train.json`). Settings of reading are in reading/config.py."""

import math
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from evaclip_model.choices import GradCheckpointing, Precision
from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.model.model_config import LOGIT_BIAS, ModelConfig
from evaclip_model.reading.config import SamplingConfig
from evaclip_model.reading.samples import ShardManifest

JOB_FILE = "train.json"
METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
RANK_STORE = "EVACLIP_RANK_STORE"
"""Environment variable: the file in which the ranks of one machine find each other."""
ERROR_FILE = "error.txt"
RESUMABLE_FILE = "resumable"
MEMORY_FILE = "out-of-memory"
CHECKPOINTS = "checkpoints"
MODEL_FOLDER = "model"
EMA_FOLDER = "model-ema"
DRY_RUN_FILE = "dry_run.json"
SHARD_CACHE = "shard-cache"

OBJECTIVES: dict[str, str] = {
    "softmax": "evaclip_model.training.loss.objective:Objective",
    "sigmoid": "evaclip_model.training.loss.objective:SigmoidObjective",
}
"""Value of `train.objective` -> module and class; see training/loss/objective.py."""
Schedule = Literal["cosine", "linear", "constant"]
SameCaption = Literal["negative", "positive", "ignore"]

DECIDE_NOTHING = (
    *("checkpoint_every_steps", "keep_checkpoints", "keep_every_steps", "grad_checkpointing"),
    *("max_nonfinite_steps", "max_rollbacks", "probe_every_steps", "validation", "zero_stage"),
)
"""Settings, by their names in `TrainConfig.compute_identity`, that change how long training takes
and what it leaves behind, never its result (rounding apart): a run goes on without them."""


class LambConfig(Config):
    """The `[train.lamb]` table: the trust ratios of `optimizer = "lamb"`."""

    trust_scope: Literal["parameter", "partition"] = "parameter"
    """What one LAMB trust ratio covers. "partition" (a rank's slice of a group, as the authors' run
    had it) makes the result depend on the number of ranks."""
    trust_clip: tuple[float, float] | None = (0.01, 10.0)
    """Bounds of LAMB's trust ratio; the lower one lets a near-zero projection head grow."""
    adapt_no_decay: bool = False
    """Whether LAMB adapts parameters without weight decay too (biases, norms, logit scale). The
    authors' run did, with one ratio for all of a group; with a ratio of its own a bias that starts
    at zero stays there, hence false, as in apex and timm; for true, give `trust_clip` a lower
    bound."""

    @model_validator(mode="after")
    def _bounds_rise(self) -> Self:
        if self.trust_clip is not None and not 0 <= self.trust_clip[0] <= self.trust_clip[1]:
            raise ValueError("trust_clip must be two rising numbers, not below 0")
        return self


class RetentionConfig(Config):
    """The `[train.checkpoints]` table: the checkpoints that stay on disk."""

    keep: int = Field(default=2, gt=0)
    """Newest checkpoints kept on disk."""
    keep_every_steps: int | None = Field(default=None, gt=0)
    """Checkpoints of steps that this divides are kept for good; none: only the newest are."""


class GuardConfig(Config):
    """The `[train.guards]` table: the steps that are not taken, and when training stops."""

    spike_action: Literal["log", "skip", "rollback"] = "log"
    """What happens when loss or gradient norm leave their recent range: a line in the log; the step
    is not taken; or back to the newest checkpoint, and past the data that led there."""
    spike_deviations: float = Field(default=8.0, gt=0)
    """Standard deviations above the running mean that make a spike."""
    spike_window_steps: int = Field(default=100, gt=1)
    """Steps that the running mean covers; before there were as many, nothing is a spike."""
    max_rollbacks: int = Field(default=10, ge=0)
    """Times that a stage may go back before training stops."""
    max_nonfinite_steps: int = Field(default=3, ge=0)
    """Steps in a row that may have a loss or gradient that is not finite, and are not taken, before
    training stops; overflows that only lower fp16's loss scale do not count."""


class LoraConfig(Config):
    """The `[train.lora]` table: low-rank updates of projections (LoRA) are trained instead of the
    weights, and are merged into them when the model is saved."""

    rank: int = Field(gt=0)
    """Rank of an update: of its two matrices, rows of one and columns of the other."""
    alpha: float = Field(gt=0)
    """An update is their product times alpha / rank."""
    on: tuple[str, ...] = Field(min_length=1)
    """Projections of all blocks, such as "q_proj" and "v_proj", or of one tower: "vision.proj"."""

    def is_named(self, name: str) -> bool:
        """Return whether `on` names a weight inside a block, `…attn.q_proj.weight` and the like."""
        words = re.sub(r"[._]weight$", "", name).split(".")
        tower = "vision" if words[0] == "visual" else words[0]
        return words[-1] in self.on or f"{tower}.{words[-1]}" in self.on

    def require_projections(self, architecture: ModelConfig) -> None:
        """Raises: InputError: `on` names what this architecture does not have."""
        there = architecture.projections
        for name in self.on:
            tower, _, word = name.rpartition(".")
            if not any(word in words and tower in ("", known) for known, words in there.items()):
                raise InputError(
                    f"lora.on names '{name}', which is not a projection of this model: choose of "
                    + "; ".join(f"{known}: {', '.join(words)}" for known, words in there.items())
                )


class TeacherConfig(Config):
    """The `[train.teacher]` table: models whose similarities are learnt too, from features of the
    very crops and captions that the stage shows, made before it."""

    models: tuple[str, ...] = Field(min_length=1)
    """What opens them, as `score` takes it; of several the mean divergence counts."""
    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the loss that is KL(teacher || student), in nats, of the softmax over the global
    batch, of rows and columns; the rest is the objective's."""
    logit_scale: float = Field(default=100.0, gt=0)
    """Inverse temperature of the teachers' similarities."""
    precision: Precision = "fp32"
    """Type of the teachers' weights and activations."""


def find_architecture(spec: str) -> ModelConfig | None:
    """Of a saved model's folder or FILE:ARCHITECTURE; none where only opening `spec` would tell."""
    with suppress(InputError):
        return ModelConfig.load(spec if Path(spec).is_dir() else spec.rpartition(":")[2])
    return None


def feature_bytes(spec: str) -> int:
    """Of a pair's two features by a teacher, half precision; of one that is not known, as many as
    of the paper's largest."""
    architecture = find_architecture(spec)
    return 2 * 2 * (architecture.embed_dim if architecture else 1024)


class ValidationConfig(Config):
    """The `[train.validation]` table: loss and retrieval on pairs that the dataset holds out
    (`dataset.validation_share`), while training goes on."""

    every_steps: int = Field(default=0, ge=0)
    """Optimizer steps between validations, of which the last step has one; 0: never."""
    samples: int = Field(default=1000, gt=1)
    """Pairs at most: every rank keeps them in memory, as pixels."""


class TrainConfig(SamplingConfig):
    """One training stage; defaults as the paper's EVA-02-CLIP-B/16 (Table 8) where it has one."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        **{name: f"lamb.{name}" for name in LambConfig.model_fields},
        "keep_checkpoints": "checkpoints.keep",
        "keep_every_steps": "checkpoints.keep_every_steps",
        **{name: f"guards.{name}" for name in GuardConfig.model_fields},
    }

    ADDED: ClassVar[tuple[str, ...]] = (
        *("objective", "same_caption", "lora", "validation", "epochs", "caption_weights"),
        *("teacher", "text_tokens", "text_tokens_kept"),
    )

    REMOVED: ClassVar[Mapping[str, str]] = {
        "loss_impl": "the loss is streamed always, in blocks of flat memory"
    }

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name of the training stage."""
    samples_seen: int = Field(default=0, ge=0)
    """Image-text pairs to train on, repeats counted; rounded up to whole global batches."""
    epochs: float | None = Field(default=None, gt=0)
    """Times that the data is gone through, instead of `samples_seen`: counted when training begins,
    and part of the address as it is written (`fit_to_data`)."""
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
    grad_clip_norm: Annotated[
        float | None, BeforeValidator(lambda value: None if value == "none" else value)
    ] = Field(default=5.0, gt=0)
    """Largest norm of the whole gradient, in the loss's units; "none" switches clipping off."""
    warmup_steps: int = Field(default=2000, ge=0)
    """Optimizer steps of linear warm-up."""
    schedule: Schedule = "cosine"
    """Learning rate after warm-up: half a cosine down to 0, a line down to 0, or as it is."""
    patch_dropout: float = Field(default=0.5, ge=0, lt=1)
    """Share of image patches masked out in training (FLIP); 0 keeps all."""
    patch_dropout_end: float | None = Field(default=None, ge=0, lt=1)
    """Share at the end of training; it changes in a line from `patch_dropout`. None: it stays."""
    unmasked_final_share: float = Field(default=0.0, ge=0, le=1)
    """Last part of the steps that sees whole images (FLIP's unmasked tuning)."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Chance that a sample skips the vision tower's last block; less for earlier ones."""
    objective: str = "softmax"
    """The loss: a name of `OBJECTIVES`. "softmax" is CLIP's, "sigmoid" SigLIP's."""
    same_caption: SameCaption = "negative"
    """What other samples of the global batch with the caption of this one, templates aside, or with
    its stored image are to it: wrong answers, as CLIP has it; right ones too; or neither."""
    teacher: TeacherConfig | None = None
    """Models to learn from besides the captions; none: from captions alone."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of softmax's target that is spread evenly over the whole global batch."""
    freeze: tuple[str, ...] = ()
    """Parts that keep their weights, without gradients and optimizer state: "vision", "text",
    "logit_scale", and parts of a tower such as "vision.patch_embed", "text.token_embedding",
    "vision.blocks.0-7" (the first eight; blocks count from 0) or "text.blocks.3.attn"."""
    lora: LoraConfig | None = None
    """Low-rank updates to train instead of the weights; what `freeze` names gets none."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a running mean of the weights, kept beside them and saved as `model-ema/`; none: no
    such mean."""
    precision: Precision = "fp32"
    """Type of weights and activations; masters and optimizer states are fp32 always."""
    lamb: LambConfig = LambConfig()
    grad_checkpointing: GradCheckpointing = "none"
    """Recompute activations in the backward pass. "full" keeps only each block's input: a third of
    the memory for 30 % more time; "selective" keeps the results of matrix products too: two thirds
    for 4 % (fp32) to 20 % (bf16)."""
    zero_stage: Literal[0, 1, 2] = 1
    """DeepSpeed ZeRO: 1 shards optimizer states over ranks, 2 gradients too, 0 nothing. There is no
    3: the largest of these models has 10 GB of weights in half precision, which fit."""
    caption_templates: tuple[str, ...] = Field(default=("{}",), min_length=1)
    """Texts around the caption, one of them drawn for every sample; `{}` stands for the caption."""
    caption_separator: str | None = Field(default=None, min_length=1)
    """Where a caption may be cut: a random number of its parts, from the first on, is kept, so that
    a title is learnt with and without the tags behind it. None keeps captions whole."""
    text_tokens: int | None = Field(default=None, gt=2)
    """Tokens of a caption that are shown at most, start and end among them (CLIPA); none: what the
    model has room for."""
    text_tokens_kept: Literal["first", "random"] = "first"
    """Those kept of a longer caption: its first ones, or random ones in their order."""
    checkpoint_every_steps: int = Field(default=500, gt=0)
    """Optimizer steps between checkpoints."""
    checkpoints: RetentionConfig = RetentionConfig()
    guards: GuardConfig = GuardConfig()
    probe_every_steps: int = Field(default=0, ge=0)
    """Optimizer steps between zero-shot classifications of the job's `probe` set; 0: never."""
    validation: ValidationConfig = ValidationConfig()
    deterministic: bool = False
    """Only algorithms that give the same bits every time; slower on GPUs."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return math.ceil(self.samples_seen / self.global_batch)

    def fit_to_data(self, samples: Mapping[str, int]) -> Self:
        """The stage with a number of samples for its `epochs` of so many, by source. A warm-up of
        more than a tenth of the steps is shortened to that, and a checkpoint interval beyond the
        last step to all steps."""
        if self.epochs is None:
            return self
        drawn = (n for name, n in samples.items() if name in (self.source_weights or samples))
        seen = math.ceil(self.epochs * sum(drawn))
        steps = math.ceil(seen / self.global_batch)
        scaled = {
            "samples_seen": seen,
            "epochs": None,
            "warmup_steps": min(self.warmup_steps, steps // 10),
            "checkpoint_every_steps": min(self.checkpoint_every_steps, max(1, steps)),
        }
        return self.model_copy(update=scaled)

    def fit_to_shards(self, manifest: Path) -> Self:
        """`fit_to_data` for the shards of a manifest."""
        if self.epochs is None:
            return self
        held = ShardManifest.read(manifest).by_source().items()
        return self.fit_to_data({name: sum(one.samples for one in of) for name, of in held})

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result, in JSON's types: a checkpoint belongs to them."""
        identity = self.compute_identity()
        return {name: value for name, value in identity.items() if name not in DECIDE_NOTHING}

    def is_frozen(self, name: str) -> bool:
        """Return whether a parameter of the model, or a part of it, is not trained."""
        if self.lora is not None and name != LOGIT_BIAS:
            return ".parametrizations." not in name or name.endswith(".original")
        return self.is_kept(name)

    def is_kept(self, name: str) -> bool:
        """Return whether `freeze` names a parameter of the model, or a part that it is in."""
        return any(is_part_of(part, name) for part in self.freeze)

    def require_parts(self, names: Collection[str]) -> None:
        """Raises: InputError: `freeze` names what is none of `names`, a model's parameters."""
        for part in self.freeze:
            if not any(is_part_of(part, name) for name in names):
                raise InputError(
                    f"freeze names '{part}', which this model does not have: give vision, text, "
                    "logit_scale, or a part of a tower such as vision.patch_embed, "
                    "vision.blocks.0-7 or text.token_embedding (evaclip models has the numbers of "
                    "blocks)"
                )

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if not self.samples_seen and self.epochs is None:
            raise ValueError("key 'samples_seen' is missing: give it above 0, or 'epochs'")
        if self.objective not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ValueError(f"objective '{self.objective}' is unknown: choose one of {known}")
        if self.objective == "sigmoid" and self.label_smoothing:
            raise ValueError("label_smoothing is of objective 'softmax': set it to 0 for 'sigmoid'")
        if self.text_tokens is None and self.text_tokens_kept != "first":
            raise ValueError("text_tokens_kept = 'random' needs text_tokens: say how many are kept")
        if self.teacher is not None and self.guards.spike_action == "rollback":
            raise ValueError("teacher excludes guards.spike_action = 'rollback', which runs ahead")
        if {"vision", "text", "logit_scale"} == set(self.freeze):
            raise ValueError("freeze leaves nothing to train: take a part out of it")
        if self.lora is not None and self.optimizer == "lamb":
            raise ValueError(
                "lora needs optimizer = 'adamw': LAMB's steps are as long as the weights, and an "
                "update begins at zero"
            )
        if self.lora is not None and self.ema_decay is not None:
            raise ValueError(
                "lora excludes ema_decay: a product of means is not a mean of products"
            )
        for template in self.caption_templates:
            if template.count("{}") != 1:
                raise ValueError(f"caption template '{template}' must contain {{}} exactly once")
        return self


def is_part_of(part: str, name: str) -> bool:
    """Return whether a parameter's name begins with `part`, a word of `freeze`: its towers are
    called vision and text, its blocks `blocks`, several of them as 0-7."""
    name = name.replace("visual.", "vision.", 1).replace(".transformer.resblocks.", ".blocks.")
    asked, words = part.split("."), name.split(".")

    def fits(asked: str, word: str) -> bool:
        blocks = re.fullmatch(r"(\d+)-(\d+)", asked)
        if blocks is None or not word.isdecimal():
            return asked == word
        return int(blocks[1]) <= int(word) <= int(blocks[2])

    return len(asked) <= len(words) and all(map(fits, asked, words))


class TrainJob(Config):
    """`train.json`: everything a rank needs to know."""

    train: TrainConfig
    start_from: Path
    """Folder of the model to start from (config.json, model.safetensors)."""
    shards: Path | str
    """Manifest of the training shards, `shards.json`: a path, or a URL that fsspec knows. The
    shards lie where it lies."""
    teachers: tuple[Path, ...] = ()
    """Folder of the features by each of the stage's teachers (reading/teacher_features.py)."""
    run_dir: Path
    """Where metrics, checkpoints and the finished model go."""
    checkpoints: str | None = None
    """URL that fsspec knows (s3://bucket/run) where checkpoints go instead, this run's alone; none:
    `checkpoints/` of the run's folder, which all ranks have to share."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """What steps the optimizer; "torch" is for one rank in fp32 or bf16, needs no DeepSpeed, and
    starts more quickly."""
    micro_batch: int | None = Field(default=None, gt=0)
    """Pairs of a rank that are in memory at once; none: its whole share of the global batch. The
    gradient is the same: features of all come first, then each part again with its gradient."""
    compile: bool = False
    """Whether torch's compiler fuses what is between the matrix products of every block: faster by
    a fifth to two fifths on an H200, half a minute at the start, other rounding."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads of each rank; none leaves torch's choice."""
    probe: Path | None = None
    """A small evaluation set, in the published layout, classified every `probe_every_steps`."""
    watchdog_s: float = Field(default=1800, gt=0)
    """Seconds without a step after which every rank writes its stacks to `stacks-RANK.txt` and the
    run ends, to be resumed."""
    profile_steps: tuple[int, int] | None = None
    """First and last step that torch's profiler records on rank 0, into `profile/`."""
    tensorboard: bool = False
    """Whether metrics are written as TensorBoard events too, into `tensorboard/`."""
    dry_run: bool = False
    """Stop after the self-test and one step that is thrown away; report memory and time."""
    read_workers: int | None = Field(default=None, ge=0)
    """Processes of each rank that read and decode ahead; 0 leaves it to a thread of the rank, none
    takes the cores that a GPU's rank leaves free."""
    shard_cache: Path | None = None
    """Folder for shards that are fetched from a URL; none: in the run's folder."""
    shard_cache_bytes: int = Field(default=32 * 2**30, ge=0)
    """Room for fetched shards, of each rank."""

    @model_validator(mode="after")
    def _has_all_teachers(self) -> Self:
        if len(self.teachers) != len(self.train.teacher.models if self.train.teacher else ()):
            raise ValueError("teachers must name a folder of features for each of train.teacher")
        return self
