"""The content of `results.json` by the questions a report asks of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.evaluate.metrics.metric import headlines_of, metrics_in, title_of
from tasks.evaluate.sets.set_registry import find_set

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A metric of one model on one set; shares are of 1, None is what is not known."""

    evalset: str
    metric: str
    title: str
    value: float | None
    interval: Sequence[float] | None
    """95 %."""
    bounds: Sequence[float] | None
    """The value if all ties were lost, and if all were won."""
    chance: float | None
    paper: Json
    """The paper's figure and how ours stands to it, where it prints one: its share `published`,
    `tolerance` in points, `verdict`, `reason`, `errata`."""

    @property
    def difference(self) -> float | None:
        if self.value is None or not self.paper:
            return None
        return 100 * (self.value - float(self.paper["published"]))


class Findings:
    """`results.json` of one evaluation."""

    def __init__(self, raw: Json) -> None:
        self.raw = raw
        self.title, self.subject = str(raw["title"]), str(raw["subject"])
        """The subject is the model that is evaluated; the others stand beside it."""
        self.others = tuple(name for name in raw["models"] if name != self.subject)
        self.models = (self.subject, *self.others)
        self.sets = tuple(raw["results"])
        self.failed = self._results_part("failed")

    def describe_model(self, model: str) -> Json:
        return self._results_part("models", model)

    def set_name(self, evalset: str) -> str:
        known = find_set(evalset)
        return known.title if known else evalset

    def describe_set(self, evalset: str) -> Json:
        return self._results_part("sets", evalset)

    def set_results(self, evalset: str, model: str) -> Json:
        return self._results_part("results", evalset, model)

    def list_metrics(self, evalset: str) -> tuple[str, ...]:
        results = self.set_results(evalset, self.subject)
        own = (name for name in self._results_part("own_metrics") if name in results)
        return (*(one.name for one in metrics_in(results)), *own)

    def metric_title(self, metric: str) -> str:
        return str(self._results_part("own_metrics").get(metric) or title_of(metric))

    def headline_metrics(self, evalset: str) -> tuple[str, ...]:
        """The metrics of a set that are shown first: the paper's."""
        about, here = self.describe_set(evalset), self.list_metrics(evalset)
        first = headlines_of(about["kind"], about.get("metric"))
        return tuple(one.name for one in first if one.name in here)

    def get_figure(self, evalset: str, model: str, metric: str) -> Figure:
        results = self.set_results(evalset, model)
        return Figure(
            evalset=evalset,
            metric=metric,
            title=self.metric_title(metric),
            value=results.get(metric),
            interval=results.get("intervals", {}).get(metric),
            bounds=results.get("bounds", {}).get(metric),
            chance=self._results_part("chance", evalset).get(metric),
            paper=self._results_part("paper", evalset, model, metric),
        )

    def list_figures(self, evalset: str, model: str) -> list[Figure]:
        return [self.get_figure(evalset, model, metric) for metric in self.list_metrics(evalset)]

    def headline_figures(self, evalset: str) -> list[Figure]:
        """The subject's figures of a set that are shown first."""
        names = self.headline_metrics(evalset)
        return [self.get_figure(evalset, self.subject, metric) for metric in names]

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
