"""What came out: the figures of a finished recipe, and what a person can do next.

Covers: reading the evaluation's and the registration's artifacts; a terminal table, a Markdown
summary.
Not here: making figures (tasks/evaluate); the full report (tasks/evaluate/report); what tracking
and the page of a flow run are told of it (flows/reporting/prefect_artifacts.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.table import Table

from flows.config.profile import Profile
from flows.config.recipe import Recipe
from flows.console.terminal import console
from flows.graph.graph import Chart
from tasks.evaluate.config import REPORT, RESULTS
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.report_files import SUMMARY
from tasks.register.aliases import RegisteredVersion
from tasks.register.promotion import read_decision

ROWS_IN_FULL = 24
"""Up to so many figures all are printed; beyond, the paper's metric of every set."""
NOTHING = "–"


def read_findings(folder: Path) -> Findings:
    """What a finished evaluation found."""
    return Findings(json.loads((folder / RESULTS).read_text()))


def figures_table(found: Findings) -> Table:
    """The figures of any number of sets and models for a terminal, averages last."""
    total = sum(len(found.metrics(one)) for one in found.sets)
    with_paper = any(found.raw.get("paper", {}).values())
    published = ("published",) if with_paper else ()
    table = Table("set", "metric", *found.models, *published, "chance", box=None, pad_edge=False)
    for evalset in found.sets:
        chosen = found.metrics if total <= ROWS_IN_FULL else found.headlines
        for metric in chosen(evalset):
            shares = [found.share(evalset, model, metric) for model in found.models]
            reference = found.published(evalset, found.subject, metric)
            beside = [reference.value if reference else None] if with_paper else []
            chance = found.chance(evalset, metric)
            table.add_row(evalset, metric, *map(_percent, [*shares, *beside, chance]))
    for cells in _averages(found, with_paper):
        table.add_row(*cells)
    return table


def print_results(recipe: Recipe, chart: Chart, profile: Profile) -> None:
    """Print the figures, where everything lies, and the commands that come next."""
    version = RegisteredVersion.of(chart.register.folder)
    aliases = version.aliases() or ()
    wanted = recipe.registry.alias  # the one in use, where the gate gave it to this version
    name = f"{version.name}@{wanted}" if wanted in aliases else str(version)
    console.print()
    console.print(figures_table(read_findings(chart.evaluate.folder)))
    console.print(f"\nreport    {chart.evaluate.folder / REPORT}")
    named = "".join(f" @{alias}" for alias in aliases)
    console.print(f"registry  {version}{named} in {profile.mlflow_uri}")
    console.print(f"gate      {read_decision(chart.register.folder).summary}", soft_wrap=True)
    console.print(f"next      python -m flows pull {name} my-model")
    console.print('          evaclip classify IMAGE "a red apple" "a dog" --model my-model')


def results_markdown(recipe: Recipe, chart: Chart) -> str:
    """The evaluation's summary under the recipe's title."""
    summary = (chart.evaluate.folder / SUMMARY).read_text()
    body = summary.partition("\n")[2].strip()
    return f"# {recipe.title}\n\n{body}\n\nRecipe digest `{recipe.digest}`."


def _averages(found: Findings, with_paper: bool) -> Iterator[list[str]]:
    tables: Mapping[str, Mapping[str, Mapping[str, float | None]]] = found.raw.get("averages", {})
    for table in tables:
        averages = [found.average(table, model) or {} for model in found.models]
        shares = [one.get("value") for one in averages]
        beside = [averages[0].get("published")] if with_paper else []
        points = [None if one is None else one / 100 for one in [*shares, *beside]]
        yield [f"Table {table}", "average", *map(_percent, points), NOTHING]


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.2f} %"
