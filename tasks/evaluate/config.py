"""What is evaluated, and how: the `[evaluate]` table of a recipe.

Covers: the configs, the stage whose artifact they decide, and the names of its files.
Not here: reading sets, metrics, the report; torch is not imported.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from evaclip_model.config import Config
from tasks.artifact import Stage

STAGE = Stage("evaluate", 1, tools=("torch", "pillow", "numpy", "ftfy"))
RESULTS = "results.json"
"""Every figure, with what it rests on."""
REPORT = "report.html"
"""The page for people; it needs no other file."""


class EvalSetConfig(Config):
    """One `[[evaluate.sets]]` entry."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What the set is called in figures: `<name>.top1`."""
    folder: str = Field(min_length=1)
    """Folder in the published webdataset layout; `demo:PATH` is inside the demo artifact."""
    kind: Literal["classification", "retrieval"]
    """Which figures are made: top-1/top-5 over class names, or R@1/5/10 in both directions."""
    templates: Literal["dataset"] | tuple[str, ...] = "dataset"
    """Prompts of a classification set: its own file, or these, each with {c} for the class name."""

    @field_validator("templates")
    @classmethod
    def _have_a_place_for_the_class(
        cls, value: Literal["dataset"] | tuple[str, ...]
    ) -> Literal["dataset"] | tuple[str, ...]:
        if value != "dataset":
            if not value:
                raise ValueError('needs at least one template, or "dataset" for the set\'s own')
            for template in value:
                if "{c}" not in template:
                    raise ValueError(f"needs {{c}} for the class name in '{template}'")
        return value

    @model_validator(mode="after")
    def _prompts_only_classes(self) -> Self:
        if self.kind == "retrieval" and self.templates != "dataset":
            raise ValueError(
                f"set '{self.name}': retrieval compares captions as they are, leave out templates"
            )
        return self


class EvaluateConfig(Config):
    """The `[evaluate]` table."""

    sets: tuple[EvalSetConfig, ...] = Field(min_length=1)
    """Evaluation sets, in the order of the report."""
    batch_size: int = Field(default=256, gt=0)
    """Images, or texts, encoded at once."""
    title: str = "Zero-shot evaluation"
    """Heading of the report."""

    @field_validator("sets")
    @classmethod
    def _are_named_once(cls, value: tuple[EvalSetConfig, ...]) -> tuple[EvalSetConfig, ...]:
        names = [one.name for one in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"needs names that differ: two sets are called '{name}'")
        return value
