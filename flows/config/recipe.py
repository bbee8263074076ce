"""A recipe: everything that decides a result, one TOML file and what it includes. Not here: putting
files together (recipe_loader.py), where things run (profile.py), what would be made
(flows/graph/graph.py), any stage's own settings."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from evaclip_model.config import Config, refuse_repeated_names
from evaclip_model.errors import InputError
from evaclip_model.reading.samples import STORED
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.cost import BF16_PEAKS, count_parts, peak_flops
from flows.config.recipe_loader import find_recipe, last_settings, read_recipe
from tasks.adopt.config import AdoptConfig
from tasks.dataset.config import CaptionSource, DatasetConfig, ScoreRules
from tasks.demo.config import DemoConfig
from tasks.download.config import DownloadConfig
from tasks.embed.config import EmbedConfig
from tasks.evaluate.config import EvaluateConfig
from tasks.initialise.config import InitialiseConfig
from tasks.interpolate.config import InterpolateConfig
from tasks.merge.config import MergeConfig, SourceConfig
from tasks.register.config import RegisterConfig
from tasks.verify.config import VerifyConfig

Table = TypeVar("Table", bound=Config)
INTERVAL = "checkpoint_every_steps"
SHARE_SELECTED = 0.65
"""Rows selected of rows read: COYO has 12 % duplicate URLs, rules and overlaps take the rest."""
_FORM = re.compile(r"(?i)(\d+)x([a-z]+\d+\w*(?: [a-z]+)?)-(\d+)GB(?:@(\d+(?:\.\d+)?))?")


class Published(Config):
    """Figures that others published of this model or data: a plan shows them beside its own."""

    gpus: str | None = None
    """GPUs the model was trained on, like "64xA100-40GB"."""
    minutes_per_40m_samples: float | None = Field(default=None, gt=0)
    """Time on those GPUs for 40 million samples."""
    imagenet_top1: float | None = Field(default=None, ge=0, le=100)
    """Zero-shot top-1 on ImageNet-1K, percent."""
    metadata_rows: dict[str, int] = Field(default_factory=dict)
    """Source -> rows of its published metadata."""
    others: dict[str, str] = Field(default_factory=dict)
    """A model that others trained alike, and where they wrote of it -> what they say that it took
    and reached."""

    @field_validator("gpus")
    @classmethod
    def _gpus_are_known(cls, gpus: str | None) -> str | None:
        if gpus is not None:
            Machines.parse_spec(gpus)
        return gpus


class RetrainConfig(ScoreRules):
    """The `[retrain]` table: how training goes on from the champion when there is new data."""

    stages: tuple[str, ...] = ()
    """Names of the training stages that run, in the order of the recipe; empty: all."""
    samples_seen: int | None = Field(default=None, gt=0)
    """Image-text pairs that each of them trains on; none: as many as the stage says."""
    lr_scale: float = Field(default=1.0, gt=0)
    """Factor on their learning rates: the champion needs smaller steps than a beginning."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Optimizer steps of linear warm-up; none: as the stage says."""


class Recipe(Config):
    """The stages' configs side by side; the tables of the TOML file have the same names."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """What it is called in run names and tags."""
    title: str
    """One line for a person: what it makes, on what."""
    demo: DemoConfig | None = None
    """The loopback web and its metadata; only recipes that bring their own data have it."""
    merge_table: MergeConfig | None = Field(None, alias="merge")
    """Metadata whose images are downloaded; `merge` is this table, where there must be one."""
    download_table: DownloadConfig | None = Field(None, alias="download")
    """How; beside `[merge]`, and only there."""
    adopt: AdoptConfig | None = None
    """Images and captions that exist already, instead of metadata or besides."""
    verify: VerifyConfig = VerifyConfig()
    embed: EmbedConfig | None = None
    """Models that look at every sample, for the scores of `[dataset]` and for `find`."""
    dataset: DatasetConfig = DatasetConfig()
    captions: tuple[CaptionSource, ...] = ()
    """Further captions of the dataset's samples, which `train.caption_weights` draws from."""
    initialise: InitialiseConfig
    train: tuple[TrainConfig, ...] = Field(min_length=1)
    """Training stages in order; each starts from the one before, the first from `initialise`."""
    interpolate: InterpolateConfig | None = None
    """The model that is evaluated and registered lies between start and end of training."""
    evaluate_table: EvaluateConfig | None = Field(None, alias="evaluate")
    """May be left out where nothing is evaluated."""
    retrain: RetrainConfig = RetrainConfig()
    """What the flow `retrain` does otherwise than the first training."""
    published: Published = Published()
    """What there is to compare with."""
    register_table: RegisterConfig | None = Field(None, alias="register")
    """May be left out where nothing is registered."""

    ADDED: ClassVar[tuple[str, ...]] = ("adopt", "embed", "captions", "interpolate")

    @property
    def merge(self) -> MergeConfig:
        """The table `[merge]`, with the hashes that `[download]` compares."""
        merge = _require_table(self.merge_table, "merge")
        column = self.download_table.hash_column if self.download_table else ""
        return merge.model_copy(update={"hash_column": column}) if column else merge

    @property
    def download(self) -> DownloadConfig:
        return _require_table(self.download_table, "download")

    @property
    def evaluate(self) -> EvaluateConfig:
        return _require_table(self.evaluate_table, "evaluate")

    @property
    def registry(self) -> RegisterConfig:
        return _require_table(self.register_table, "register")

    @property
    def judging_rules(self) -> DatasetConfig:
        """The rules of `[dataset]` with those of `[retrain]`, for what a champion judges."""
        judge = self.retrain.model_dump(include=set(ScoreRules.ADDED))
        return self.dataset.model_copy(update=judge)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of all sources, those of metadata first."""
        tables = [table for table in (self.merge_table, self.adopt) if table]
        return tuple(source.name for table in tables for source in table.sources)

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        names = [stage.name for stage in self.train]
        refuse_repeated_names("training stages", names)
        if self.merge_table is None and self.adopt is None:
            raise ValueError(
                "there is no data: give [merge] with [download], or [[adopt.sources]], or both"
            )
        if (self.merge_table is None) != (self.download_table is None):
            raise ValueError("[merge] and [download] belong together: give both or neither")
        if self.merge_table and self.merge.rows_per_file % self.download.samples_per_shard:
            raise ValueError(
                f"merge.rows_per_file ({self.merge.rows_per_file}) must be a multiple of "
                f"download.samples_per_shard ({self.download.samples_per_shard}), or every file "
                "ends in a short shard"
            )
        refuse_repeated_names("sources", self.sources)
        self._require_fitting_stages()
        if (self.dataset.asks_scores or self.dataset.asks_features) and self.embed is None:
            raise ValueError(
                "dataset.min_score, keep_share, semantic_duplicates and near_evaluation judge by "
                "scores and features: add an [embed] table"
            )
        if self.retrain.asks_scores and self.dataset.asks_scores:
            both = "have a model judge all data, those of [retrain] the champion what is new"
            raise ValueError(f"dataset.min_score and keep_share {both}: leave out one of the two")
        if self.register_table is not None and self.evaluate_table is None:
            raise ValueError("[register] needs [evaluate]: the gate judges by its figures")
        sets = [one.name for one in self.evaluate_table.sets] if self.evaluate_table else []
        _require_known("retrain.stages", self.retrain.stages, "the training stages", names)
        if (part := self.interpolate) is not None:
            chosen = (*part.choose_on, *part.keep_on)
            _require_known("[interpolate]", chosen, "evaluate.sets", sets)
        judged = self.register_table.gate.metrics if self.register_table else ()
        unknown = [metric for metric in judged if metric.rpartition(".")[0] not in sets]
        _require_known("register.gate.metrics", unknown, "a metric of evaluate.sets", sets)
        captions = [one.name for one in self.captions]
        refuse_repeated_names("captions", captions)
        for stage in self.train:
            where, read, drawn = f"train.{stage.name}", stage.source_weights, stage.caption_weights
            _require_known(f"{where}.source_weights", read, "the sources", self.sources)
            _require_known(f"{where}.caption_weights", drawn, "the captions", (STORED, *captions))
        for one in self.captions:
            if all(one.name not in stage.caption_weights for stage in self.train):
                raise ValueError(
                    f"no training stage draws captions '{one.name}': set train.caption_weights"
                )
            named = () if one.source is None else (one.source,)
            _require_known(f"captions '{one.name}'", named, "the sources", self.sources)
        return self

    def _require_fitting_stages(self) -> None:
        """Refuse a training stage that cannot do what it says, whatever the data is."""
        for stage in self.train:
            every, why = stage.validation.every_steps, ""
            if every and not self.dataset.validation_share:
                why = (
                    f" has validation.every_steps = {every}, but dataset.validation_share holds "
                    "nothing out: set it above 0"
                )
            kept = stage.checkpoints.keep_every_steps
            why = why or _why_too_long(stage, "warmup_steps", stage.warmup_steps)
            why = why or _why_too_long(stage, "checkpoints.keep_every_steps", kept)
            why = why or self._why_model_unfit(stage)
            if why:
                raise ValueError(f"training stage '{stage.name}'{why}")
        sources = self.merge_table.sources if self.merge_table else ()
        caps = {source.name: source.target_count for source in sources if source.target_count}
        require_samples(self.train, self.sources, caps, "at most ")

    def _why_model_unfit(self, stage: TrainConfig) -> str:
        architecture = self.initialise.load_architecture()
        try:
            parts = count_parts(architecture.at_image_px(stage.image_px))
            for part in stage.freeze:  # deeper words are held against the model itself
                depth = 3 if ".blocks." in part else 2
                cut = ".".join(part.split(".")[:depth])
                stage.model_copy(update={"freeze": (cut,)}).require_parts(parts)
            if stage.lora is not None:
                stage.lora.require_projections(architecture)
        except InputError as error:
            return f": {error}"
        return ""

    def retraining_stages(self) -> tuple[TrainConfig, ...]:
        wanted = self.retrain
        changes = wanted.model_dump(include={"samples_seen", "warmup_steps"}, exclude_none=True)
        if wanted.samples_seen is not None:
            changes["epochs"] = None
        stages = [one for one in self.train if not wanted.stages or one.name in wanted.stages]
        found = []
        for stage in stages:
            rates = stage.model_dump(include={"lr_vision", "lr_text", "lr_other"})
            scaled = {name: rate * wanted.lr_scale for name, rate in rates.items()}
            found.append(stage.model_copy(update={**changes, **scaled}))
        return tuple(found)

    @property
    def digest(self) -> str:
        """16 hex characters over all that decides a result; equal recipes have equal digests."""
        identity = self.compute_identity()
        decides = {name: value for name, value in identity.items() if name != "published"}
        text = json.dumps(decides, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1) + "\n"


def _require_known(where: str, names: Iterable[str], of: str, known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            there = ", ".join(known) or "there is none"
            raise ValueError(f"{where} names '{name}', which is none of {of} ({there})")


def _require_table(table: Table | None, name: str) -> Table:
    if table is None:
        raise InputError(f"the recipe has no [{name}] table: add one")
    return table


def _why_too_long(stage: TrainConfig, name: str, steps: int | None) -> str:
    if stage.epochs is not None or (steps or 0) <= stage.steps:
        return ""
    return (
        f" has {stage.steps:,} steps (samples_seen / global_batch), fewer than {name} = {steps:,}: "
        f"set it to at most {stage.steps:,}"
    )


def require_samples(
    stages: Iterable[TrainConfig], sources: Sequence[str], has: Mapping[str, int], limit: str = ""
) -> None:
    """Refuse a stage that takes more at once than `has` of its sources, where that is known of
    them; `limit`: "at most ", where they may be fewer."""
    for stage in stages:
        drawn = list(stage.source_weights or sources)
        known = [name for name in drawn if name in has]
        samples = sum(has[name] for name in known)
        few, why = min(known, key=has.__getitem__, default=None), ""
        if known == drawn and samples < stage.global_batch:
            why = (
                f"has global_batch = {stage.global_batch:,}, but there are {limit}{samples:,} "
                f"samples of {', '.join(drawn)}: set it lower"
            )
        elif few is not None and has[few] < stage.lanes:
            why = (
                f"reads {stage.lanes} lanes, but source '{few}' has {limit}{has[few]:,} samples: "
                "set 'lanes' lower"
            )
        if why:
            raise InputError(f"training stage '{stage.name}' {why}, or add samples")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by name (`demo`) or path (`my/own.toml`), with `table.key=value` overrides.

    A checkpoint interval longer than the training is refused, but not one that stood there before
    `samples_seen` or `global_batch` was changed: the end is saved always.
    """
    path = find_recipe(name_or_path)
    recipe = Recipe.from_mapping(read_recipe(path, overrides), where=path.name)
    for number, stage in enumerate(recipe.train):
        last = last_settings(path, overrides, stage.name, number, {"samples_seen", "global_batch"})
        why = _why_too_long(stage, INTERVAL, stage.checkpoint_every_steps)
        if INTERVAL in last and why:
            where = f"{path.name}: training stage '{stage.name}'"
            raise InputError(f"{where}{why}, or leave it out: the end is saved always")
    return recipe


class SourceYield(NamedTuple):
    """The rows and samples that a source can give."""

    source: SourceConfig
    wanted: int
    """Rows that its cap asks for."""
    selected: int
    """Rows of those that its metadata has, where somebody has counted it."""

    @property
    def samples(self) -> int:
        """Of the selected rows, after the download."""
        cap = self.source.target_count or 0
        return min(cap, math.floor(self.selected * self.source.expected_success))


def source_yields(recipe: Recipe) -> list[SourceYield]:
    yields = []
    for source in recipe.merge_table.sources if recipe.merge_table else ():
        wanted, rows = source.wanted_rows or 0, recipe.published.metadata_rows.get(source.name)
        there = wanted if rows is None else math.floor(rows * SHARE_SELECTED)
        yields.append(SourceYield(source, wanted, min(wanted, there)))
    return yields


def planned_stages(recipe: Recipe) -> tuple[TrainConfig, ...]:
    """The training stages with expected samples for their epochs; none where only data can tell."""
    samples = {one.source.name: one.samples for one in source_yields(recipe)}
    return tuple(stage.fit_to_data(samples) for stage in recipe.train)


def expected_samples(recipe: Recipe) -> int:
    return sum(one.samples for one in source_yields(recipe))


@dataclass(frozen=True)
class Machines:
    """A number of equal GPUs."""

    count: int
    gpu: str
    """Name, as `peak_flops` knows it."""
    memory_gb: int
    """Of one, as it is sold: an "80GB" GPU has 80."""
    price: float | None = None
    """Of one for an hour, in whatever currency it was given."""

    @classmethod
    def parse_spec(cls, text: str) -> Self:
        """Read COUNTxGPU-MEMORYGB[@PRICE], like `16xA100-40GB@2.5`."""
        found = _FORM.fullmatch(text.strip())
        if not found or int(found[1]) == 0:
            raise InputError(
                f"'{text}' names no GPUs: write COUNTxGPU-MEMORYGB, and @PRICE of one GPU's hour "
                "where it matters, like 16xA100-40GB@2.5"
            )
        if peak_flops(found[2]) is None:
            known = ", ".join(BF16_PEAKS)
            raise InputError(f"GPU '{found[2]}' has no known peak rate; there are: {known}")
        price = None if found[4] is None else float(found[4])
        return cls(int(found[1]), found[2], int(found[3]), price)

    def __str__(self) -> str:
        return f"{self.count} x {self.gpu} {self.memory_gb} GB"
