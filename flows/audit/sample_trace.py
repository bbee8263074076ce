"""One sample's way: its source row, its shard, the dataset versions and models that hold it; and
samples that may be used no longer: new dataset versions, and the models that saw those samples. Not
here: the index that is searched (tasks/index/sample_index.py), what a takedown leaves out
(tasks/dataset)."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evaclip_model.reading.samples import SHARDS, Captions, ShardManifest, read_captions
from evaclip_model.reading.urls import is_url, locate_file
from flows.config.profile import Profile, load_profile
from flows.graph import ancestry
from flows.graph.outside_data import sort_takedowns
from flows.graph.step import Step
from tasks.artifacts.artifact import Artifact, Made, Role, read_artifacts
from tasks.artifacts.root_store import fetch_artifact
from tasks.dataset import config as data
from tasks.dataset.choose import Asked, find_asked
from tasks.dataset.dataset import Takedowns, make_dataset
from tasks.dataset.lists import is_url as is_web_url, read_takedowns, takedowns_digest
from tasks.index.sample_index import Kind, SampleIndex, read_verdicts, shard_location
from tasks.merge.database import normal_urls
from tasks.progress import Report, report_nothing
from tasks.verify.config import STAGE as VERIFY

MOST_NAMED = 50  # entries without a sample that are named one by one


class Version(NamedTuple):
    """A dataset version made from the shard that holds the sample."""

    digest: str
    left_out: str | None
    """Why it does not hold the sample; None if it does."""
    models: tuple[ancestry.Model, ...]
    """What was trained on it, if it holds the sample."""
    captions: Captions
    """Further ones that it has for the sample, by name."""


class Trace(NamedTuple):
    """One stored copy of what was looked for."""

    row: dict[str, Any]
    """In the index: uid, source, original_id, url, hashes, key."""
    shard: str
    """Path or URL of the tar."""
    made_by: tuple[Artifact, ...]
    """What was made of its row, from the merge that selected it to its verification."""
    versions: tuple[Version, ...]


def trace_sample(
    *, root: Path, url: str | None = None, uid: str | None = None, sha256: str | None = None
) -> list[Trace]:
    """Every stored sample under `root` that has this URL, uid and hash, of which one is given."""
    given: dict[Kind, tuple[str, ...]] = {}
    if url is not None:
        given[Kind.URL] = sort_takedowns([url.strip()])[Kind.URL]
    given |= {Kind.UID: (uid,)} if uid else {}
    given |= {Kind.HASH: (sha256.lower(),)} if sha256 else {}
    artifacts = read_artifacts(root)
    return [
        one
        for verified in artifacts
        if verified.kind == VERIFY.name
        for one in _in_one_verification(verified, given, artifacts)
    ]


def _in_one_verification(
    verified: Artifact, asked: Asked, artifacts: Sequence[Artifact]
) -> Iterator[Trace]:
    index = SampleIndex(fetch_artifact(verified.folder))
    rows = [row for kind, values in asked.items() for row in index.find_samples(kind, values)]
    if not rows:
        return
    versions = [
        (*one, tuple(ancestry.models_of(one[0], artifacts)))
        for one in find_versions(verified, [row["row"] for row in rows], artifacts)
    ]
    verdicts = read_verdicts(verified.folder)
    made_by = tuple(ancestry.ancestors_of(verified, artifacts))
    for row in rows:
        held, shard = [], locate_shard(verified, verdicts[row["shard"]].path)
        for version, first, reasons, models in versions:
            reason = reasons.get(first + row["row"])
            further = {} if reason else _further_captions(version, shard, row["key"])
            held.append(Version(version.digest, reason, () if reason else models, further))
        yield Trace(row, shard, made_by, tuple(held))


def find_versions(
    verified: Artifact, rows: Sequence[int], artifacts: Sequence[Artifact]
) -> Iterator[tuple[Artifact, int, dict[int, str]]]:
    """Dataset versions of a verification, its first row there, and why some `rows` are left out."""
    for one in artifacts:
        if one.kind == data.STAGE.name:
            first = ancestry.first_row_in(one, verified, artifacts)
            if first is not None:
                yield one, first, left_out(one, [first + row for row in rows])


def locate_shard(artifact: Artifact, shard: str) -> str:
    place = shard_location(artifact.folder.resolve(), shard)
    return place if is_url(place) else locate_file(str(Path(place).resolve()))


def _further_captions(version: Artifact, shard: str, key: str) -> Captions:
    """Return what a dataset version says of a sample besides the caption in its shard."""
    if not (fetch_artifact(version.folder) / data.CAPTIONS).is_dir():
        return {}
    for one in ShardManifest.read(version.folder / SHARDS).shards:
        if one.captions and locate_shard(version, one.path) == shard:
            return read_captions(str(version.folder / one.captions)).get(key, {})
    return {}


def describe_traces(found: Trace, root: Path) -> Iterator[str]:
    row = found.row
    yield f"uid         {row['uid']}"
    yield f"source      {row['source']}, row {row['original_id'] or 'without an id'}"
    yield f"url         {row['url']}"
    yield f"sha256      {row['sha256'] or 'not recorded'} (stored {row['stored_sha256']})"
    yield f"shard       {found.shard}, key {row['key']}"
    steps = ", ".join(f"{artifact.kind} {artifact.digest}" for artifact in found.made_by)
    yield f"made by     {steps}"
    if not found.versions:
        yield "dataset     none was made of this shard"
    for version in found.versions:
        state = f"left out ({version.left_out})" if version.left_out else "holds it"
        yield f"dataset     {version.digest}: {state}"
        for name, captions in version.captions.items():
            yield f"  captions  {name}: {' | '.join(captions)}"
        for model in version.models:
            yield from ancestry.describe_model(model, root)


class Succession(NamedTuple):
    """A dataset version and the one that replaces it."""

    old: Artifact
    new: Artifact
    removed: int
    """Samples that the old version had and the new one has not."""
    models: tuple[ancestry.Model, ...]
    """Trained on any of them."""


def take_down(file: Path, root: Path, is_dry: bool = False) -> list[Succession]:
    """Replace every dataset version under `root` that holds a sample named in `file`, or say which:
    a dry one makes nothing, and has each as its own successor."""
    entries, artifacts = read_takedowns([file]), read_artifacts(root)
    asked = sort_takedowns(entries)
    groups: defaultdict[str, list[Artifact]] = defaultdict(list)
    for artifact in artifacts:  # versions that differ in their takedowns alone, oldest first
        if artifact.kind == data.STAGE.name:
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
    versions = [artifact for artifact in artifacts if artifact.kind == data.STAGE.name]
    for folder in {ancestry.data_of(version, artifacts).folder for version in versions}:
        for kind, values in sort_takedowns(entries).items():
            for row in SampleIndex(fetch_artifact(folder)).find_samples(kind, values):
                marks |= {row["uid"], row["sha256"], row["stored_sha256"]}
                marks.add((row["url"] or "").partition("://")[2])
    urls = tuple(filter(is_web_url, entries))
    normal = dict(zip(urls, normal_urls(urls), strict=True)) if urls else {}
    unmatched = [
        entry
        for entry in entries
        if marks.isdisjoint(
            form.partition("://")[2] if is_web_url(form) else form
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
    folder = fetch_artifact(version.folder, data.LEFT_OUT)
    table = pq.read_table(folder / data.LEFT_OUT, filters=pc.field("row").isin(list(rows)))
    return dict(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))


def describe_replacement(done: Succession, root: Path) -> Iterator[str]:
    left = f"{done.removed:,} samples left out, {done.new.counts['samples']:,} stay"
    is_obeyed = done.new.digest == done.old.digest
    end = " obeys this already" if is_obeyed else f" -> {done.new.digest}: {left}"
    yield f"dataset     {done.old.digest}{end}"
    if done.models:
        yield "  models trained on samples that are taken down:"
    for model in done.models:
        yield from ancestry.describe_model(model, root)


def _make_successor(
    versions: Sequence[Artifact],
    entries: Sequence[str],
    asked: Asked,
    artifacts: Sequence[Artifact],
    root: Path,
    is_dry: bool,
) -> Succession | None:
    """The version that obeys all takedowns of `versions` and `entries`; None if none is needed."""
    verified = ancestry.data_of(versions[0], artifacts)
    index = SampleIndex(fetch_artifact(verified.folder))
    rows = find_asked(index, asked)
    wanted = rows.tolist()
    holding = [version for version in versions if set(wanted) - left_out(version, wanted).keys()]
    if not holding:
        return None
    old = max(versions, key=lambda version: version.counts["left_out"])
    models = {m.digest: m for version in holding for m in ancestry.models_of(version, artifacts)}
    if is_dry:
        removed = len(set(wanted) - left_out(old, wanted).keys())
        return Succession(old, old, removed, tuple(models.values()))
    read = {
        one.digest: {*(one.folder / data.TAKEN_DOWN).read_text().splitlines()} for one in versions
    }
    obeyed = set(entries).union(*read.values())
    others = obeyed - read[old.digest] - set(entries)
    if others:  # obeyed by a version that is not among the ancestors of `old`
        rows = np.union1d(rows, find_asked(index, sort_takedowns(others)))
    ancestors = ancestry.ancestors_of(verified, artifacts)
    rules = json.loads((old.folder / data.REPORT).read_text())["rules"]
    config = data.DatasetConfig.from_mapping(
        {**old.config, **rules}, where=str(old.folder / data.REPORT)
    )
    takedowns = Takedowns(tuple(sorted(obeyed)), lambda _: rows, fetch_artifact(old.folder))

    def make(_: Profile, out: Path, report: Report) -> Made:
        return make_dataset(config, ancestors, data.OutsideFiles(), takedowns, out, report)

    inputs = {**old.parents, Role.TAKEDOWNS: takedowns_digest(obeyed)}
    new = Step(root, data.STAGE, config, inputs, make).make_artifact(load_profile(), report_nothing)
    removed = int(new.counts["left_out"] - old.counts["left_out"])
    return Succession(old, new, removed, tuple(models.values()))
