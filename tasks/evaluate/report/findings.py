"""What `results.json` says, by the questions a report asks of it.

Covers: the one place of the reports that knows the keys of `results.json`; what is missing reads
as None or empty, so that a report can be made of any evaluation.
Not here: computing any figure, wording, layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tasks.evaluate.metrics.metric import headlines_of, metrics_in
from tasks.evaluate.sets.set_registry import KnownSet, find_set


@dataclass(frozen=True)
class Published:
    """What the paper prints for a figure, and how ours stands to it; shares are of 1."""

    value: float | None
    tolerance: float | None
    verdict: str
    """ "reproduced", "differs" or "not comparable"."""
    reason: str
    errata: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """`results.json` of one evaluation."""

    raw: Mapping[str, Any]

    @property
    def title(self) -> str:
        return str(self.raw["title"])

    @property
    def subject(self) -> str:
        """Name of the model that is evaluated; the others stand beside it."""
        return str(self.raw["subject"])

    @cached_property
    def models(self) -> tuple[str, ...]:
        """All models, the subject first."""
        return (self.subject, *(name for name in self.raw["models"] if name != self.subject))

    @property
    def others(self) -> tuple[str, ...]:
        return self.models[1:]

    def about(self, model: str) -> Mapping[str, Any]:
        """Digest, architecture, parameters, GFLOPs and source of a model."""
        found: Mapping[str, Any] = self.raw["models"][model]
        return found

    @cached_property
    def sets(self) -> tuple[str, ...]:
        """Sets that were evaluated, in the order of the evaluation."""
        return tuple(self.raw["results"])

    @property
    def failed(self) -> Mapping[str, str]:
        """Sets that were not, with the reason."""
        return self._part("failed")

    def known(self, evalset: str) -> KnownSet | None:
        """The set of the paper, or its variant, that this one is."""
        return find_set(evalset)

    def name(self, evalset: str) -> str:
        """A set's name for people."""
        known = self.known(evalset)
        return known.title if known else evalset

    def set(self, evalset: str) -> Mapping[str, Any]:
        """What is known of a set: its size, fingerprints, prompts and warnings."""
        found: Mapping[str, Any] = self.raw["sets"][evalset]
        return found

    def figures(self, evalset: str, model: str) -> Mapping[str, Any] | None:
        """All figures of a model on a set."""
        found: Mapping[str, Any] | None = self._part("results").get(evalset, {}).get(model)
        return found

    def metrics(self, evalset: str) -> tuple[str, ...]:
        """The figures of a set, in the order in which they are shown."""
        return tuple(one.name for one in metrics_in(self.figures(evalset, self.subject) or {}))

    def headlines(self, evalset: str) -> tuple[str, ...]:
        """The figures of a set that are shown first: the paper's metric."""
        about = self.set(evalset)
        return tuple(one.name for one in headlines_of(about["kind"], about.get("metric")))

    def share(self, evalset: str, model: str, metric: str) -> float | None:
        """A figure as a share of 1."""
        figures = self.figures(evalset, model)
        value = None if figures is None else figures.get(metric)
        return None if value is None else float(value)

    def interval(self, evalset: str, model: str, metric: str) -> tuple[float, float] | None:
        """Its 95 % interval."""
        figures = self.figures(evalset, model) or {}
        found = figures.get("intervals", {}).get(metric)
        return None if found is None else (float(found[0]), float(found[1]))

    def bounds(self, evalset: str, model: str, metric: str) -> tuple[float, float] | None:
        """What losing or winning every tie would give."""
        figures = self.figures(evalset, model) or {}
        found = figures.get("bounds", {}).get(metric)
        return None if found is None else (float(found[0]), float(found[1]))

    def chance(self, evalset: str, metric: str) -> float | None:
        """What random answers reach."""
        found = self.raw["chance"].get(evalset, {}).get(metric)
        return None if found is None else float(found)

    def published(self, evalset: str, model: str, metric: str) -> Published | None:
        """What the paper prints for this figure of this model."""
        found = self._part("paper").get(evalset, {}).get(model, {}).get(metric)
        if not found:
            return None
        value = found.get("published")
        return Published(
            None if value is None else float(value),
            found.get("tolerance"),
            str(found["verdict"]),
            str(found.get("reason", "")),
            tuple(found.get("errata") or ()),
        )

    def paired(self, evalset: str) -> Mapping[str, Mapping[str, Any]]:
        """Other model -> metric -> difference to it, its interval and p-value."""
        found: Mapping[str, Mapping[str, Any]] = self._part("paired").get(evalset, {})
        return found

    def average(self, table: str, model: str) -> Mapping[str, Any] | None:
        """A model's average over the sets of a table, or why there is none."""
        found: Mapping[str, Any] | None = self._part("averages").get(table, {}).get(model)
        return found

    def robustness(self, model: str) -> Mapping[str, Any] | None:
        """The gap between ImageNet-1K and the average of the sets of Table 1b."""
        found: Mapping[str, Any] | None = self._part("robustness").get(model)
        return found

    def contamination(self, evalset: str) -> Mapping[str, Any] | None:
        """How many images are near-duplicates of training images, and figures without them."""
        found: Mapping[str, Any] | None = self._part("contamination").get(evalset)
        return found

    def _part(self, name: str) -> Mapping[str, Any]:
        """A part of the results, empty where this evaluation has none."""
        found: Mapping[str, Any] = self.raw.get(name) or {}
        return found
