"""The figures of a finished recipe, and the commands that come next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flows.config.profile import Profile
from flows.config.recipe import Recipe
from flows.graph.graph import Graph
from flows.reporting.terminal import console
from tasks.evaluate.config import REPORT, RESULTS, SUMMARY
from tasks.register.model_versions import RegisteredVersion
from tasks.register.promotion import read_decision
from tasks.table import NOTHING, Table, terminal_table, words

if TYPE_CHECKING:
    from tasks.evaluate.report.findings import Findings

ROWS_IN_FULL = 24
"""Up to so many figures all are printed; beyond, the paper's metric of every set."""


def read_findings(folder: Path) -> Findings:
    from tasks.evaluate.report.findings import Findings  # imports torch, which `plan` need not

    return Findings(json.loads((folder / RESULTS).read_text()))


def figures_table(found: Findings) -> Table:
    """The figures of any number of sets and models, averages last."""
    is_short = sum(len(found.list_metrics(one)) for one in found.sets) <= ROWS_IN_FULL
    table = Table.of("set", words("metric"), *found.models, "published", "chance")
    for evalset in found.sets:
        for metric in found.list_metrics(evalset) if is_short else found.headline_metrics(evalset):
            figures = [found.get_figure(evalset, model, metric) for model in found.models]
            beside = figures[0].paper.get("published"), figures[0].chance
            shares = [*(one.value for one in figures), *beside]
            table.add(evalset, metric, *map(_format_percent, shares))
    for key in found.raw.get("averages", {}):
        averages = [found.table_average(key, model) for model in found.models]
        points = [one["value"] for one in averages]
        points.append(None if points[0] is None else averages[0]["intersection_reference"])
        shares = [None if one is None else one / 100 for one in points]
        table.add(f"Table {key}", "average", *map(_format_percent, shares), NOTHING)
    return table


def print_figures(evaluation: Path) -> None:
    console.print(terminal_table(figures_table(read_findings(evaluation))))


def print_results(recipe: Recipe, graph: Graph, profile: Profile) -> None:
    """Print the figures, where everything lies, and the commands that come next."""
    version = RegisteredVersion.from_registration(graph.register.folder)
    aliases = version.current_aliases() or ()
    wanted = recipe.registry.alias  # the one in use, where the gate gave it to this version
    name = f"{version.name}@{wanted}" if wanted in aliases else str(version)
    console.print()
    print_figures(graph.evaluate.folder)
    named = "".join(f" @{alias}" for alias in aliases)
    for line in (
        f"\nreport    {graph.evaluate.folder / REPORT}",
        f"registry  {version}{named} in {profile.mlflow_uri}",
        f"gate      {read_decision(graph.register.folder).summary}",
        f"next      python -m flows pull {name} my-model",
        '          evaclip classify IMAGE "a red apple" "a dog" --model my-model',
    ):
        console.print(line, soft_wrap=True)


def results_markdown(recipe: Recipe, graph: Graph) -> str:
    """The evaluation's summary under the recipe's title."""
    summary = (graph.evaluate.folder / SUMMARY).read_text()
    body = summary.partition("\n")[2].strip()
    return f"# {recipe.title}\n\n{body}\n\nRecipe digest `{recipe.digest}`."


def _format_percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.2f} %"
