"""The content of `results.json` by the questions a report asks of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tasks.evaluate.metrics.metric import headlines_of, metrics_in, title_of
from tasks.evaluate.sets.set_registry import find_set

Json = Mapping[str, Any]


@dataclass(frozen=True)
class PublishedFigure:
    """A figure that the paper prints, and how ours stands to it."""

    value: float
    """A share of 1."""
    tolerance: float | None
    """Points."""
    verdict: str
    """ "reproduced", "differs" or "not comparable"."""
    reason: str
    errata: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A metric of one model on one set; shares are of 1, None is what is not known."""

    evalset: str
    metric: str
    title: str
    value: float | None
    interval: tuple[float, float] | None
    """95 %."""
    bounds: tuple[float, float] | None
    """The value if all ties were lost, and if all were won."""
    chance: float | None
    published: PublishedFigure | None

    @property
    def difference(self) -> float | None:
        if self.value is None or self.published is None:
            return None
        return 100 * (self.value - self.published.value)


@dataclass(frozen=True)
class Findings:
    """`results.json` of one evaluation."""

    raw: Json

    @property
    def title(self) -> str:
        return str(self.raw["title"])

    @property
    def subject(self) -> str:
        """Name of the model that is evaluated; the others stand beside it."""
        return str(self.raw["subject"])

    @cached_property
    def models(self) -> tuple[str, ...]:
        return (self.subject, *(name for name in self.raw["models"] if name != self.subject))

    @property
    def others(self) -> tuple[str, ...]:
        return self.models[1:]

    def describe_model(self, model: str) -> Json:
        found: Json = self.raw["models"][model]
        return found

    @cached_property
    def sets(self) -> tuple[str, ...]:
        return tuple(self.raw["results"])

    @property
    def failed(self) -> Json:
        return self._results_part("failed")

    def set_name(self, evalset: str) -> str:
        known = find_set(evalset)
        return known.title if known else evalset

    def describe_set(self, evalset: str) -> Json:
        found: Json = self.raw["sets"][evalset]
        return found

    def set_results(self, evalset: str, model: str) -> Json:
        found: Json = self._results_part("results", evalset, model)
        return found

    def list_metrics(self, evalset: str) -> tuple[str, ...]:
        results = self.set_results(evalset, self.subject)
        own = (name for name in self.raw.get("own_metrics", ()) if name in results)
        return (*(one.name for one in metrics_in(results)), *own)

    def metric_title(self, metric: str) -> str:
        return str(self.raw.get("own_metrics", {}).get(metric) or title_of(metric))

    def headline_metrics(self, evalset: str) -> tuple[str, ...]:
        """The metrics of a set that are shown first: the paper's."""
        about, here = self.describe_set(evalset), self.list_metrics(evalset)
        first = headlines_of(about["kind"], about.get("metric"))
        return tuple(one.name for one in first if one.name in here)

    def get_figure(self, evalset: str, model: str, metric: str) -> Figure:
        results = self.set_results(evalset, model)
        spread, bounds = (results.get(key, {}).get(metric) for key in ("intervals", "bounds"))
        given = self._results_part("paper", evalset, model, metric)
        return Figure(
            evalset=evalset,
            metric=metric,
            title=self.metric_title(metric),
            value=results.get(metric),
            interval=tuple(spread) if spread else None,
            bounds=tuple(bounds) if bounds else None,
            chance=self._results_part("chance", evalset).get(metric),
            published=PublishedFigure(
                given["published"],
                given["tolerance"],
                given["verdict"],
                given["reason"],
                tuple(given["errata"]),
            )
            if given
            else None,
        )

    def list_figures(self, evalset: str, model: str) -> list[Figure]:
        return [self.get_figure(evalset, model, metric) for metric in self.list_metrics(evalset)]

    def headline_figures(self, evalset: str, model: str) -> list[Figure]:
        return [
            self.get_figure(evalset, model, metric) for metric in self.headline_metrics(evalset)
        ]

    def paired_differences(self, evalset: str, other: str) -> Mapping[str, Json]:
        """Metric -> the subject's difference to another model, its interval and p-value."""
        return self._results_part("paired", evalset, other)

    def table_average(self, table: str, model: str) -> Json:
        """A model's average over the sets of a table, or why there is none; empty where no set of
        the table was evaluated."""
        return self._results_part("averages", table, model)

    def contaminated_images(self, evalset: str) -> Json:
        """Images with near-duplicates in the training data, and figures without them; empty where
        that is not known."""
        return self._results_part("contamination", evalset)

    def _results_part(self, *path: str) -> Json:
        found: Json = self.raw
        for key in path:
            found = found.get(key) or {}
        return found
