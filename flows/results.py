"""What came out: the figures of a finished recipe, and what a person can do next.

Covers: reading the evaluation's and the registration's artifacts; a terminal table, a Markdown one.
Not here: making figures (tasks/evaluate); the full report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from flows.chart import Chart
from flows.profile import Profile
from flows.recipe import Recipe
from flows.terminal import console
from tasks.evaluate.config import REPORT, RESULTS
from tasks.register.aliases import RegisteredVersion
from tasks.register.promotion import read_decision

COLUMNS = ("set", "metric", "trained", "untrained", "chance")


@dataclass(frozen=True)
class Figure:
    """One row of the results, as shares of 1."""

    evalset: str
    metric: str
    trained: float
    untrained: float
    chance: float

    def cells(self) -> tuple[str, str, str, str, str]:
        shares = (f"{100 * share:.2f} %" for share in (self.trained, self.untrained, self.chance))
        return (self.evalset, self.metric, *shares)  # type: ignore[return-value]


def read_figures(chart: Chart) -> Iterator[Figure]:
    """The rows of the finished evaluation, in the order of the report."""
    results = json.loads((chart.evaluate.folder / RESULTS).read_text())
    for name, by_model in results["results"].items():
        for metric, chance in results["chance"][name].items():
            trained, untrained = by_model["trained"][metric], by_model["untrained"][metric]
            yield Figure(name, metric, trained, untrained, chance)


def print_results(recipe: Recipe, chart: Chart, profile: Profile) -> None:
    """Print the figures, where everything lies, and the commands that come next."""
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for figure in read_figures(chart):
        table.add_row(*figure.cells())
    version = RegisteredVersion.of(chart.register.folder)
    aliases = version.aliases() or ()
    name = f"{version.name}@{aliases[0]}" if aliases else str(version)
    console.print()
    console.print(table)
    console.print(f"\nreport    {chart.evaluate.folder / REPORT}")
    named = "".join(f" @{alias}" for alias in aliases)
    console.print(f"registry  {version}{named} in {profile.mlflow_uri}")
    console.print(f"gate      {read_decision(chart.register.folder).summary}", soft_wrap=True)
    console.print(f"next      python -m flows pull {name} my-model")
    console.print('          evaclip classify IMAGE "a red apple" "a dog" --model my-model')


def results_markdown(recipe: Recipe, chart: Chart) -> str:
    """The figures as a Markdown table under the recipe's title."""
    head = [f"# {recipe.title}", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    rows = ["| " + " | ".join(figure.cells()) + " |" for figure in read_figures(chart)]
    return "\n".join([*head, *rows, "", f"Recipe digest `{recipe.digest}`."])
