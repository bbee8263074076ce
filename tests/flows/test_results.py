"""What a person sees of an evaluation at the end: a table for any number of sets, and a summary."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.commands.run import figures_table, read_findings
from flows.graph.outside_data import describe_sets
from tasks.artifacts.artifact import Artifact
from tasks.evaluate.config import ATTACHED
from tasks.evaluate.report.findings import Findings
from tasks.evaluate.report.write_reports import write_reports
from tasks.table import terminal_table
from tests.tasks.evaluate.made_up import made_up

SETS = ("cifar10", "flickr30k")
MANY = (*SETS, "stl10", "mnist", "pcam", "eurosat", "fer2013", "gtsrb", "ucf101")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return made_up(tmp_path_factory.mktemp("made_up"), MANY, images_per_class=1)[0]


def printed(found: Findings) -> list[list[str]]:
    """The table's lines, each as its words of at least two spaces between."""
    out = io.StringIO()
    Console(file=out, width=160).print(terminal_table(figures_table(found)))
    return [line.split() for line in out.getvalue().splitlines()]


def only(results: dict[str, Any], sets: tuple[str, ...]) -> Findings:
    """The results of some of the sets."""
    parts = ("sets", "results", "chance", "paper", "paired")
    cut = {part: {key: results[part][key] for key in sets} for part in parts}
    return Findings({**results, **cut})


def test_few_sets_are_printed_with_every_figure(results: dict[str, Any]):
    lines = printed(only(results, SETS))
    assert lines[0] == ["set", "metric", "candidate", "champion", "published", "chance"]
    assert [line[1] for line in lines if line[0] == "cifar10"] == ["top1", "top5", "mean_per_class"]
    top1 = results["results"]["cifar10"]["candidate"]["top1"]
    assert lines[1][2] == f"{100 * top1:.2f}" and "98.40" in lines[1]


def test_many_sets_are_printed_with_the_papers_metric_and_averages_last(results: dict[str, Any]):
    lines = printed(only(results, MANY))
    assert [line[1] for line in lines if line[0] == "cifar10"] == ["top1"]
    assert sum(line[0] == "flickr30k" for line in lines) == 2
    averages = [line for line in lines if line[0] == "Table"]
    assert [line[1] for line in averages] == ["1b", "2", "3"]
    assert all("–" in line for line in averages), "refused: sets are missing"


def test_without_published_figures_there_is_no_column_for_them(results: dict[str, Any]):
    lines = printed(Findings({**only(results, SETS).raw, "paper": {}}))
    assert lines[0] == ["set", "metric", "candidate", "champion", "chance"]


def test_sets_become_datasets_with_their_own_digest(results: dict[str, Any], tmp_path: Path):
    (tmp_path / "results.json").write_text(json.dumps(results))
    made = Artifact(
        kind="evaluate",
        digest="0" * 16,
        folder=tmp_path,
        parents={},
        config={},
        counts={},
        files={},
        created="",
    )
    folders = {name: tmp_path / name for name in ("cifar10", "flickr30k", "not_read")}
    one, other = describe_sets(made, folders)
    assert (one["name"], one["digest"]) == ("cifar10", results["sets"]["cifar10"]["fingerprint"])
    assert json.loads(one["source"])["uri"] == (tmp_path / "cifar10").as_uri()
    assert json.loads(other["source"])["uri"] == (tmp_path / "flickr30k").as_uri()
    assert read_findings(tmp_path).sets == MANY


def test_what_is_kept_with_the_run_is_written_by_the_reports(tmp_path: Path):
    made = made_up(tmp_path, ["stl10"], images_per_class=1)
    written = {path.name for path in write_reports(tmp_path, *made)}
    assert set(ATTACHED) == (written - {"summary.md"}) | {"results.json"}
