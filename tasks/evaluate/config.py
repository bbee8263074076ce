"""The `[evaluate]` table of a recipe: the sets, their prompts, the precision. No torch here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from evaclip_model.config import Config
from tasks.artifacts.artifact import Stage
from tasks.evaluate.sets import set_registry
from tasks.process.launch import RankLaunch

STAGE = Stage("evaluate", 2, tools=("torch", "pillow", "numpy", "ftfy"))
Precision = Literal["fp32", "bf16", "fp16"]
Probe = Literal["linear", "knn", "few_shot"]
RESULTS = "results.json"  # every figure, with the data and settings behind it
REPORT = "report.html"  # for people; it needs no other file
MARKDOWN = "report.md"
SUMMARY = "summary.md"  # the report's first screen, for the page of a flow run
FIGURES = "figures.csv"
ANSWERS = "answers.parquet"  # every model's answer to every sample; stays beside the results
ATTACHED = (REPORT, MARKDOWN, RESULTS, FIGURES)
"""Files that are kept with the tracking run."""
OWN_PROMPTS: tuple[set_registry.PromptSource, ...] = ("dataset", "openai")
"""Sources of templates for a set that is not in the registry."""
OWN_NAMES: tuple[set_registry.NameSource, ...] = ("dataset",)


class EvalSetConfig(Config):
    """One `[[evaluate.sets]]` entry; for a set of the registry its name says everything."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the set in figures, `<name>.top1`; one of the registry's, or your own."""
    folder: str = Field(min_length=1)
    """Folder in the published webdataset layout, `evaluation/<its published name>` of a known set;
    `demo:PATH` is inside the demo artifact."""
    kind: set_registry.Kind
    """Decides the figures: top-1/top-5 over class names, mAP over several classes an image,
    R@1/5/10 in both directions, or the right choice among a few texts or images."""
    templates: set_registry.PromptSource | tuple[str, ...] = "dataset"
    """Prompts of a set with classes: its own file, a named source, or these, with {c} each."""
    classnames: set_registry.NameSource | tuple[str, ...] = "dataset"
    """Names of its classes in the order of labels: its own file, a named source, or these."""
    crop_px: int = Field(default=0, ge=0, le=64)
    """Pixels cut off every side of every image first; 2 takes off ObjectNet's red border, which
    the paper does not."""
    split: str = ""
    """The images of the set, in words: where the paper does not name its own, figures are compared
    with the paper's only if this is given."""

    @model_validator(mode="before")
    @classmethod
    def _take_the_registrys(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
            return values
        name = values["name"]
        known = set_registry.find_set(name)
        if known is None:
            if "folder" not in values and "kind" not in values:
                near = set_registry.nearest_set(name)
                raise ValueError(
                    f"set '{name}' is not in the registry ({near}); a set of your own needs a "
                    "folder and a kind"
                )
            return values
        if values.get("kind", known.kind) != known.kind:
            raise ValueError(
                f"set '{name}' is a {known.kind} set; give another set of yours another name"
            )
        defaults = {"folder": f"{set_registry.FOLDER}/{known.wds}", "kind": known.kind}
        if known.kind in set_registry.CLASS_KINDS:
            defaults |= {"templates": known.prompts[0], "classnames": known.names[0]}
        return {**defaults, **values}

    @field_validator("templates", "classnames", mode="before")
    @classmethod
    def _are_a_source_or_a_list(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in get_args(set_registry.PromptSource):
            raise ValueError(
                f"needs a list, or one of {', '.join(get_args(set_registry.PromptSource))}"
            )
        return value

    @field_validator("templates")
    @classmethod
    def _have_a_place_for_the_class(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError('needs at least one template, or "dataset" for the set\'s own')
        for template in () if isinstance(value, str) else value:
            if "{c}" not in template:
                raise ValueError(f"needs {{c}} for the class name in '{template}'")
        return value

    @model_validator(mode="after")
    def _fits_its_prompts(self) -> Self:
        if self.kind not in set_registry.CLASS_KINDS:
            if (self.templates, self.classnames) != ("dataset", "dataset"):
                raise ValueError(
                    f"set '{self.name}': {self.kind} compares captions as they are, leave out "
                    "templates and classnames"
                )
            return self
        known = set_registry.find_set(self.name)
        for what, chosen, there in (
            ("templates", self.templates, known.prompts if known else OWN_PROMPTS),
            ("classnames", self.classnames, known.names if known else OWN_NAMES),
        ):
            if isinstance(chosen, str) and chosen not in there:
                raise ValueError(
                    f"set '{self.name}' has no {what} in '{chosen}': give one of "
                    f"{', '.join(there)}, or a list of your own"
                )
        return self


class ProbeConfig(Config):
    """The `[evaluate.probe]` table: how the probes of `evaluate.probes` are made."""

    l2: float | None = Field(None, gt=0)
    """Of the linear probe: mean cross-entropy + l2 / 2 times the squares of its weights; unset: the
    best of 0.1 to 1e-7 on every fifth training image of a class, which is held out for that."""
    few_shot_l2: float = Field(1e-4, gt=0)
    """The same of few-shot classifiers."""
    shots: tuple[Literal[1, 2, 4, 8, 16, 32], ...] = (1, 4, 16)
    """Training images a class of the few-shot figures."""
    seeds: int = Field(5, ge=2, le=100)
    """Draws of those images; the figure is the mean over them."""
    neighbours: int = Field(20, ge=1)
    """Training images that vote, of kNN."""
    weighted: bool = True
    """True: a vote counts exp(cosine / 0.07); False: one."""


class EvaluateConfig(Config):
    REMOVED: ClassVar[Mapping[str, str]] = {
        "batch_size": "the model sees chunks of one size, so that none decides a figure"
    }

    ADDED: ClassVar[tuple[str, ...]] = ("released", "probes", "probe", "metrics")

    sets: tuple[EvalSetConfig, ...] = Field(min_length=1)
    """Evaluation sets, in the order of the report; `sets = "paper"` and `sets = "datacomp38"` are
    those of the paper and of DataComp."""
    precision: Precision = "fp32"
    """Of the model that makes features; they are compared in fp32 whatever it is."""
    max_distance: int = Field(4, ge=0, le=8)
    """Bits of the 64 of a perceptual hash in which a test image and a training image that look
    alike may differ."""
    title: str = "Zero-shot evaluation"
    """Heading of the report."""
    released: Mapping[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], str] = {}
    """SHA-256 of a file of weights, as its publisher names it -> the paper's row that it is behind,
    such as "EVA-02-CLIP-B/16": only a model known by its content is compared with the paper."""
    metrics: tuple[str, ...] = ()
    """Python files of metrics of your own, whose content is part of the digest."""
    probes: tuple[Probe, ...] = ()
    """Figures of what can be learnt from features, on every classification set that has a train
    part: a folder `train` in the set's, with tars as in `test`, or with a whole set."""
    probe: ProbeConfig = ProbeConfig()

    @property
    def probe_figures(self) -> tuple[str, ...]:
        """Names of the figures of the probes."""
        names = {"linear": ("linear_probe",), "knn": ("knn",)}
        few = tuple(f"few_shot_{shots}" for shots in self.probe.shots)
        return tuple(name for one in dict.fromkeys(self.probes) for name in names.get(one, few))

    @field_validator("released")
    @classmethod
    def _are_rows_of_the_paper(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        if value:
            from tasks.evaluate.paper.published import paper  # imports torch

            rows = [one.row for one in paper().models]
            for row in value.values():
                if row not in rows:
                    raise ValueError(f"needs a row of the paper, not '{row}': {', '.join(rows)}")
        return value

    @field_validator("sets", mode="before")
    @classmethod
    def _may_be_a_group(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in set_registry.GROUPS:
            raise ValueError(f"needs a list of sets, or one of {', '.join(set_registry.GROUPS)}")
        return [{"name": name} for name in set_registry.sets_of_group(value)]

    @field_validator("sets")
    @classmethod
    def _are_named_once(cls, value: tuple[EvalSetConfig, ...]) -> tuple[EvalSetConfig, ...]:
        names = [one.name for one in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"needs names that differ: two sets are called '{name}'")
        return value


class EvaluationMachine(Config):
    """The machine of an evaluation, which changes no figure; from EVACLIP_EVALUATE_<FIELD>."""

    ranks: int = Field(0, ge=0)
    """Processes that encode; 0: one a GPU, or one on the CPU, each on one of its cores."""
    workers: int | None = Field(None, ge=0)
    """Decoding threads of each rank; unset: the cores that its GPU leaves, none on the CPU."""
    cache: Path | None = None
    """Folder that keeps features for later evaluations; unset: none."""
    cache_gb: float = Field(20.0, ge=0)
    """Most that is kept there, in GB; the least recently used features go first."""
    gpus: int = Field(0, ge=0)
    """GPUs of each machine; 0: CPUs do everything."""
    launch: RankLaunch = RankLaunch()
    """What starts ranks on other machines, if it does; they are then as many as it says."""

    @property
    def rank_count(self) -> int:
        return self.ranks or self.gpus or 1

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.gpus else "cpu"
