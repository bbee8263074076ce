"""Ancestors and descendants: from a dataset version down to the models that saw it.

A parent that is not an artifact under the root is data from outside, unless its role says that a
step made it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from evaclip_model.errors import InputError
from tasks.artifacts.artifact import Artifact, Role
from tasks.artifacts.provenance import walk_up
from tasks.demo.config import STAGE as DEMO
from tasks.interpolate.config import STAGE as INTERPOLATE
from tasks.join.config import STAGE as JOIN
from tasks.join.join import read_parts
from tasks.lineage.journal import JOURNALS, runs_of_digest
from tasks.register.config import STAGE as REGISTER
from tasks.register.model_versions import RegisteredVersion
from tasks.train.config import STAGE as TRAIN
from tasks.verify.config import STAGE as VERIFY

_OF_STEPS = (
    *(Role.MERGE, Role.DOWNLOAD, Role.ADOPT, Role.DATA),
    *(Role.DATASET, Role.START, Role.END, Role.TRAINED),
)


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
