"""Samples that may be used no longer: new dataset versions, and the models that saw those samples.
Not here: what a takedown leaves out (tasks/dataset)."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.config.profile import Profile, load_profile
from flows.graph.ancestry import Model, ancestors_of, data_of, describe_model, models_of
from flows.graph.outside_data import sort_takedowns
from flows.graph.step import Step
from tasks.artifacts.artifact import Artifact, Made, Role, read_artifacts
from tasks.dataset.choose import Asked, find_asked
from tasks.dataset.config import LEFT_OUT, REPORT, STAGE, TAKEN_DOWN, DatasetConfig, OutsideFiles
from tasks.dataset.dataset import Takedowns, make_dataset
from tasks.dataset.lists import is_url, read_takedowns, takedowns_digest
from tasks.index.sample_index import SampleIndex
from tasks.merge.database import normal_urls
from tasks.progress import Report, report_nothing

MOST_NAMED = 50  # entries without a sample that are named one by one


class Succession(NamedTuple):
    """A dataset version and the one that replaces it."""

    old: Artifact
    new: Artifact
    removed: int
    """Samples that the old version had and the new one has not."""
    models: tuple[Model, ...]
    """Trained on any of them."""


def take_down(file: Path, root: Path, is_dry: bool = False) -> list[Succession]:
    """Replace every dataset version under `root` that holds a sample named in `file`, or say which:
    a dry one makes nothing, and has each as its own successor."""
    entries, artifacts = read_takedowns([file]), read_artifacts(root)
    asked = sort_takedowns(entries)
    groups: defaultdict[str, list[Artifact]] = defaultdict(list)
    for artifact in artifacts:  # versions that differ in their takedowns alone, oldest first
        if artifact.kind == STAGE.name:
            parents = {**artifact.parents, Role.TAKEDOWNS: ""}
            groups[json.dumps([parents, artifact.config], sort_keys=True)].append(artifact)
    made = (
        _make_successor(one, entries, asked, artifacts, root, is_dry) for one in groups.values()
    )
    return [succession for succession in made if succession is not None]


def describe_unmatched(file: Path, root: Path) -> Iterator[str]:
    """The entries of `file` that no dataset version under `root` has a sample of, for a person."""
    entries, artifacts = read_takedowns([file]), read_artifacts(root)
    marks: set[str] = set()
    versions = [artifact for artifact in artifacts if artifact.kind == STAGE.name]
    for folder in {data_of(version, artifacts).folder for version in versions}:
        for kind, values in sort_takedowns(entries).items():
            for row in SampleIndex(folder).find_samples(kind, values):
                marks |= {row["uid"], row["sha256"], row["stored_sha256"]}
                marks.add((row["url"] or "").partition("://")[2])
    urls = tuple(filter(is_url, entries))
    normal = dict(zip(urls, normal_urls(urls), strict=True)) if urls else {}
    unmatched = [
        entry
        for entry in entries
        if marks.isdisjoint(
            form.partition("://")[2] if is_url(form) else form
            for form in (entry, normal.get(entry) or entry)
        )
    ]
    if unmatched:
        yield (
            f"{len(unmatched):,} of {len(entries):,} entries name no sample of any dataset version "
            "(a takedown names samples: a site's name alone finds nothing):"
        )
    yield from (f"  {entry}" for entry in unmatched[:MOST_NAMED])
    if len(unmatched) > MOST_NAMED:
        yield f"  and {len(unmatched) - MOST_NAMED:,} more"


def left_out(version: Artifact, rows: Sequence[int]) -> dict[int, str]:
    """Return those of an index's rows that a dataset version leaves out, with the reason."""
    # row groups whose statistics say that they hold none of the rows are not read
    table = pq.read_table(version.folder / LEFT_OUT, filters=pc.field("row").isin(list(rows)))
    return dict(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))


def describe_replacement(done: Succession, root: Path) -> Iterator[str]:
    left = f"{done.removed:,} samples left out, {done.new.counts['samples']:,} stay"
    is_obeyed = done.new.digest == done.old.digest
    end = " obeys this already" if is_obeyed else f" -> {done.new.digest}: {left}"
    yield f"dataset     {done.old.digest}{end}"
    if done.models:
        yield "  models trained on samples that are taken down:"
    for model in done.models:
        yield from describe_model(model, root)


def _make_successor(
    versions: Sequence[Artifact],
    entries: Sequence[str],
    asked: Asked,
    artifacts: Sequence[Artifact],
    root: Path,
    is_dry: bool,
) -> Succession | None:
    """The version that obeys all takedowns of `versions` and `entries`; None if none is needed."""
    verified = data_of(versions[0], artifacts)
    index = SampleIndex(verified.folder)
    rows = find_asked(index, asked)
    wanted = rows.tolist()
    holding = [version for version in versions if set(wanted) - left_out(version, wanted).keys()]
    if not holding:
        return None
    old = max(versions, key=lambda version: version.counts["left_out"])
    models = {m.digest: m for version in holding for m in models_of(version, artifacts)}
    if is_dry:
        removed = len(set(wanted) - left_out(old, wanted).keys())
        return Succession(old, old, removed, tuple(models.values()))
    read = {one.digest: {*(one.folder / TAKEN_DOWN).read_text().splitlines()} for one in versions}
    obeyed = set(entries).union(*read.values())
    others = obeyed - read[old.digest] - set(entries)
    if others:  # obeyed by a version that is not among the ancestors of `old`
        rows = np.union1d(rows, find_asked(index, sort_takedowns(others)))
    ancestors = ancestors_of(verified, artifacts)
    rules = json.loads((old.folder / REPORT).read_text())["rules"]
    config = DatasetConfig.from_mapping({**old.config, **rules}, where=str(old.folder / REPORT))
    takedowns = Takedowns(tuple(sorted(obeyed)), lambda _: rows, old.folder)

    def make(_: Profile, out: Path, report: Report) -> Made:
        return make_dataset(config, ancestors, OutsideFiles(), takedowns, out, report)

    inputs = {**old.parents, Role.TAKEDOWNS: takedowns_digest(obeyed)}
    new = Step(root, STAGE, config, inputs, make).make_artifact(load_profile(), report_nothing)
    removed = int(new.counts["left_out"] - old.counts["left_out"])
    return Succession(old, new, removed, tuple(models.values()))
