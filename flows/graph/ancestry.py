"""Ancestors and descendants: from a dataset version down to the models that saw it; and both as
trees for a person. Not here: single samples (flows/audit/sample_trace.py), the registry
(tasks/register/model_versions.py), the picture (tasks/lineage/lineage_svg.py).

A parent that is not an artifact under the root is data from outside, unless its role says that a
step made it.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from evaclip_model.errors import InputError
from flows.config.profile import Profile
from flows.reporting.terminal import summarise_counts
from tasks.adopt.config import STAGE as ADOPT
from tasks.artifacts.artifact import (
    Artifact,
    Change,
    Lineage,
    Node,
    Role,
    lineage_of,
    list_changes,
    read_artifacts,
    walk_up,
)
from tasks.demo.config import STAGE as DEMO
from tasks.interpolate.config import STAGE as INTERPOLATE
from tasks.join.config import STAGE as JOIN
from tasks.join.join import read_parts
from tasks.lineage.journal import JOURNALS, runs_of_digest
from tasks.merge.config import STAGE as MERGE
from tasks.register.config import STAGE as REGISTER
from tasks.register.model_versions import Described, RegisteredVersion, made_from
from tasks.tracking import TrackingStore
from tasks.train.config import STAGE as TRAIN
from tasks.verify.config import STAGE as VERIFY

_OF_STEPS = (
    *(Role.MERGE, Role.DOWNLOAD, Role.ADOPT, Role.DATA),
    *(Role.DATASET, Role.START, Role.END, Role.TRAINED),
)
SHORTEST_DIGEST = 6  # characters of a digest that are taken for one


class Model(NamedTuple):
    """A trained model, by the name of the training stage that made it."""

    name: str
    digest: str
    registered: tuple[RegisteredVersion, ...]


def parent_of(artifact: Artifact, role: str, artifacts: Sequence[Artifact]) -> Artifact:
    """The artifact that `artifact` was made from; raises InputError where it is gone."""
    for other in artifacts:
        if other.digest == artifact.parents[role]:
            return other
    raise InputError(
        f"{artifact.folder} was made from {role} {artifact.parents[role]}, which is gone: run its "
        "recipe again"
    )


def ancestors_of(artifact: Artifact, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """The ancestors of an artifact in the order of work, itself the last, without the demo's world;
    raises InputError where something of it is gone."""
    found = _walk_upward(artifact, artifacts)
    for one in found:
        for role in one.parents:
            if role in _OF_STEPS or one.kind == JOIN.name:
                parent_of(one, role, found)
    return found


def data_of(version: Artifact, artifacts: Sequence[Artifact]) -> Artifact:
    """The data of a dataset version, whatever stages came between: the artifact that holds the
    index, a verification or a join of several. Raises InputError where something of it is gone."""
    ancestors_of(version, artifacts)
    data = find_data(version, artifacts)
    assert data is not None, "a dataset version has no other beginning"
    return data


def find_data(version: Artifact, artifacts: Sequence[Artifact]) -> Artifact | None:
    """The data of a version, as `data_of`; None if it is not there any more."""
    above = reversed(_walk_upward(version, artifacts))
    return next((one for one in above if one.kind in (VERIFY.name, JOIN.name)), None)


def parts_of(data: Artifact, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """The verifications in a join, in its order; a verification is its own one part."""
    if data.kind != JOIN.name:
        return [data]
    return [parent_of(data, role, artifacts) for role in data.parents]


def first_row_in(
    version: Artifact, verified: Artifact, artifacts: Sequence[Artifact]
) -> int | None:
    """The row at which a verification's samples begin in the index of a dataset version's data;
    None if they are not in it."""
    above = _walk_upward(version, artifacts)
    if all(one.digest != verified.digest for one in above):
        return None
    for join in (one for one in above if one.kind == JOIN.name):
        for part in read_parts(join.folder):
            if part.digest == verified.digest:
                return part.first_row
    return 0


def children_of(digest: str, artifacts: Sequence[Artifact]) -> list[Artifact]:
    return [artifact for artifact in artifacts if digest in artifact.parents.values()]


def models_of(dataset: Artifact, artifacts: Sequence[Artifact]) -> list[Model]:
    """Every model trained on a dataset version, or started from such a model, in their order."""
    models: dict[str, Model] = {}
    waiting = [dataset.digest]
    while waiting:
        for artifact in children_of(waiting.pop(0), artifacts):
            is_model = artifact.kind in (TRAIN.name, INTERPOLATE.name)
            if is_model and artifact.digest not in models:
                waiting.append(artifact.digest)
                versions = tuple(
                    RegisteredVersion.from_registration(child.folder)
                    for child in children_of(artifact.digest, artifacts)
                    if child.kind == REGISTER.name
                )
                name = str(artifact.config.get("name", artifact.kind))
                models[artifact.digest] = Model(name, artifact.digest, versions)
    return list(models.values())


def describe_model(model: Model, root: Path) -> Iterator[str]:
    """A model, its runs, its registered versions with their aliases, which asks the registry."""
    yield f"  model     {model.name} {model.digest}"
    for run in runs_of_digest(root / JOURNALS, model.digest):
        yield f"    run     {run}"
    for version in model.registered:
        aliases = version.current_aliases()
        named = "".join(f" @{alias}" for alias in aliases or ())
        if aliases is None:
            named = f" (its aliases are unknown: {version.tracking_uri} does not answer)"
        yield f"    version {version}{named}"


def _walk_upward(artifact: Artifact, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """An artifact behind all that it was made from, each once."""
    known = {one.digest: one for one in artifacts if one.kind != DEMO.name}
    return list(walk_up([artifact], known.get).values())


def version_tree(version: Described, before: Described | None) -> Iterator[str]:
    """A registered version as lines: what it was made from, what changed since `before`."""
    aliases = "".join(f" @{alias}" for alias in version.aliases)
    day = datetime.fromtimestamp(version.created / 1000, UTC).strftime("%Y-%m-%d %H:%M")
    yield f"{version}{aliases}  registered {day} UTC"
    if version.lineage is None:
        yield f"  no lineage: {version.no_lineage}"
        return
    yield from upward_tree(version.lineage)
    if before is None:
        yield f"\nno other version of {version.name} to compare with"
    elif before.lineage is None:
        yield f"\n{before} has no lineage to compare with"
    else:
        yield f"\nsince {before}:"
        yield from describe_changes(list_changes(before.lineage, version.lineage))


def describe_changes(found: Sequence[Change]) -> Iterator[str]:
    if not found:
        yield "  no setting and no data changed"
    for change in found:
        old, new = _shorten_value(change.old), _shorten_value(change.new)
        said = f"{new} (new)" if change.old is None else f"{old} -> {new}"
        yield f"  {change.where}: {f'{old} (gone)' if change.new is None else said}"


def upward_tree(lineage: Lineage) -> Iterator[str]:
    """Return what every head was made from, as a tree; what was shown already is named only."""
    shown: set[str] = set()

    def parents(digest: str) -> list[tuple[str, str]]:
        node = lineage.find_node(digest)
        return list(node.parents.items()) if node else []

    def line(role: str, digest: str) -> str:
        node = lineage.find_node(digest)
        return _node_line(node, role) if node else f"{role} {digest}  (data from outside)"

    for head in lineage.heads:
        if head not in shown:
            yield line("", head)
            yield from _tree_branches(head, parents, line, shown, "")


def downward_tree(artifact: Artifact, artifacts: Sequence[Artifact]) -> Iterator[str]:
    """An artifact and what was made of it, as a tree."""
    known = {one.digest: one for one in artifacts}

    def children(digest: str) -> list[tuple[str, str]]:
        return [("", child.digest) for child in children_of(digest, artifacts)]

    def line(role: str, digest: str) -> str:
        said = _node_line(Node.from_artifact(known[digest]), role)
        if known[digest].kind != REGISTER.name:
            return said
        return f"{said} of {RegisteredVersion.from_registration(known[digest].folder).name}"

    yield line("", artifact.digest)
    yield from _tree_branches(artifact.digest, children, line, set(), "")


def data_trees(profile: Profile, what: str) -> Iterator[str]:
    """Trees of what an artifact was made from and what became of it, or of a source's metadata;
    `what` is the beginning of the digest, or the source's name."""
    root = profile.root.resolve()
    artifacts = read_artifacts(root)
    is_digest = len(what) >= SHORTEST_DIGEST
    found = [one for one in artifacts if is_digest and one.digest.startswith(what)]
    database = TrackingStore.at(profile.mlflow_uri, "").database
    digest, versions = found[0].digest if found else what, list[str]()
    if database is None or database.is_file():
        versions = made_from(profile.mlflow_uri, digest)
    for artifact in found:
        yield "made from"
        yield from upward_tree(lineage_of([artifact], root))
        yield "\nmade of it"
        yield from downward_tree(artifact, artifacts)
    if not found and not versions:
        yield from _source_trees(root, what, artifacts)
    if versions:
        yield f"\nregistered from it: {', '.join(versions)}"


def _source_trees(root: Path, source: str, artifacts: Sequence[Artifact]) -> Iterator[str]:
    readers = [one for one in artifacts if one.kind in (MERGE.name, ADOPT.name)]
    users = [one for one in readers if source in one.parents]
    if not users:
        known = ", ".join(sorted({role for one in readers for role in one.parents}))
        raise InputError(
            f"'{source}' is neither the digest of an artifact under {root} nor one of its sources; "
            f"those are: {known or 'none yet'}; a model goes by NAME@ALIAS"
        )
    for place, user in enumerate(users):
        yield f"{'' if not place else chr(10)}{source} {user.parents[source]}"
        yield from downward_tree(user, artifacts)


def _tree_branches(
    digest: str,
    next_of: Callable[[str], list[tuple[str, str]]],
    line: Callable[[str, str], str],
    shown: set[str],
    indent: str,
) -> Iterator[str]:
    shown.add(digest)
    following = next_of(digest)
    for place, (role, other) in enumerate(following):
        is_last = place == len(following) - 1
        again = other in shown and bool(next_of(other))
        branch, above = "└─" if is_last else "├─", "  (see above)" * again
        yield f"{indent}{branch} {line(role, other)}{above}"
        if not again:
            deeper = indent + ("   " if is_last else "│  ")
            yield from _tree_branches(other, next_of, line, shown, deeper)


def _node_line(node: Node, role: str) -> str:
    named = f"{node.title} {node.model}".rstrip()
    named = f"{role}: {named}" if role and role != node.kind else named
    told = summarise_counts(node.counts)
    return f"{named} {node.digest}  {node.created[:16].replace('T', ' ')}  {told}".rstrip()


def _shorten_value(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
