"""One sample's way: its source row, its shard, the dataset versions and models that hold it. Not
here: the index that is searched (tasks/index/sample_index.py), removing anything
(dataset_replacement.py)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaclip_model.reading.captions import Captions, read_captions
from evaclip_model.reading.samples import SHARDS, ShardManifest
from evaclip_model.reading.urls import is_url
from flows.audit.dataset_replacement import left_out
from flows.graph.ancestry import Model, ancestors_of, describe_model, first_row_in, models_of
from flows.graph.outside_data import sort_takedowns
from tasks.artifacts.artifact import Artifact, read_artifacts
from tasks.dataset.choose import Asked
from tasks.dataset.config import CAPTIONS, STAGE as DATASET
from tasks.index.sample_index import Kind, SampleIndex, read_verdicts, shard_location
from tasks.verify.config import STAGE as VERIFY


class Version(NamedTuple):
    """A dataset version made from the shard that holds the sample."""

    digest: str
    left_out: str | None
    """Why it does not hold the sample; None if it does."""
    models: tuple[Model, ...]
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
    index = SampleIndex(verified.folder)
    rows = [row for kind, values in asked.items() for row in index.find_samples(kind, values)]
    if not rows:
        return
    versions = [
        (*one, tuple(models_of(one[0], artifacts)))
        for one in find_versions(verified, [row["row"] for row in rows], artifacts)
    ]
    verdicts = read_verdicts(verified.folder)
    made_by = tuple(ancestors_of(verified, artifacts))
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
        if one.kind == DATASET.name:
            first = first_row_in(one, verified, artifacts)
            if first is not None:
                yield one, first, left_out(one, [first + row for row in rows])


def locate_shard(artifact: Artifact, shard: str) -> str:
    place = shard_location(artifact.folder.resolve(), shard)
    return place if is_url(place) else str(Path(place).resolve())


def _further_captions(version: Artifact, shard: str, key: str) -> Captions:
    """Return what a dataset version says of a sample besides the caption in its shard."""
    if not (version.folder / CAPTIONS).is_dir():
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
            yield from describe_model(model, root)
