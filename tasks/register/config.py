"""The name of a registered model, and when it replaces the one in use: the `[register]` table."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from evaclip_model.config import Config
from tasks.artifacts.artifact import Stage

STAGE = Stage("register", 2, tools=("mlflow",))
REGISTERED = "registered.json"
"""Name, version, alias, uri, tracking_uri."""
DECISION = "decision.json"
"""Of the gate, with every reason; `DECISION_PAGE` is the same for people."""
DECISION_PAGE = "decision.md"


class GatePolicy(Config):
    """The `[register.gate]` table: when a new version replaces the champion. A gain is the
    candidate's figure less the champion's on the same samples, in points (hundredths), with its
    paired 95 % interval."""

    ADDED: ClassVar[tuple[str, ...]] = ("refuse_certain_loss",)

    metrics: tuple[str, ...] = ()
    """What the candidate must be better at, each as SET.METRIC; empty: the first metric of every
    set (top1, map; recall at 1 in both directions)."""
    need: Literal["any", "all"] = "any"
    """How many of `metrics` must be better for certain. "any": one; its p-value is multiplied by
    their number (Bonferroni), so that an equal model passes at most once in twenty times."""
    min_gain_points: float = Field(default=0.0, ge=0)
    """The lower end of a gain's interval must lie above this."""
    max_loss_points: float = Field(default=1.0, ge=0)
    """No first metric of any set, and none of `metrics`, may lose more than this; a loss that is
    larger but not certain holds the candidate back, one that is certain rejects it."""
    refuse_certain_loss: bool = False
    """Whether a loss that is certain rejects however small it is, as fine-tuning wants it. Its
    p-value is multiplied by the number of metrics that are guarded (Bonferroni)."""
    max_contaminated: float | None = Field(default=None, ge=0, le=1)
    """Largest share of a set's images that may be among the candidate's training data; none: it is
    reported, not judged: drawings look like each other, and published models have several percent
    of some sets."""
    max_size_ratio: float | None = Field(default=1.5, gt=0)
    """Largest size of the weights, as a multiple of the champion's."""
    max_latency_ratio: float | None = Field(default=None, gt=0)
    """Longest time of an image, as a multiple of the champion's on the same machine; none: it is
    not measured."""
    approval: bool = False
    """Whether a person is asked before a better model becomes champion."""

    @field_validator("metrics")
    @classmethod
    def _name_a_set_and_a_metric(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch(r".+\.[^.]+", name):
                raise ValueError(f"needs SET.METRIC, as imagenet1k.top1, not '{name}'")
        return value


class RegisterConfig(Config):
    model_config = ConfigDict(protected_namespaces=())

    model_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in the registry; every training that gets it becomes one more version."""
    alias: str = Field("champion", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Alias of the version in use, which a better one takes over: `models:/NAME@ALIAS` loads it."""
    candidate_alias: str = Field("challenger", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Alias that every new version gets, whatever becomes of it."""
    gate: GatePolicy = GatePolicy()
    """When a new version takes over `alias`."""

    @field_validator("alias", "candidate_alias")
    @classmethod
    def _is_no_version(cls, value: str) -> str:
        if value == "latest" or re.fullmatch(r"[vV]\d+", value):
            raise ValueError("is reserved by MLflow for versions; take another word")
        return value

    @model_validator(mode="after")
    def _aliases_differ(self) -> Self:
        if self.alias == self.candidate_alias:
            raise ValueError(f"alias and candidate_alias are both '{self.alias}'")
        return self


@dataclass(frozen=True)
class LargeWeights:
    """The limit above which weights are not copied into the registry, and where they go."""

    above_gb: float = 5.0
    """In 10^9 bytes."""
    place: str = ""
    """Folder or URI of an object store that gets them, once each; empty: they stay where the
    training left them, and every loader has to reach that path."""


COPIED = LargeWeights()
