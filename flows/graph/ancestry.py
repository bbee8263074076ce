"""What was made from what: from a dataset version down to the models that saw it.

Covers: walking the manifests under one root.
Not here: samples (trace.py, takedown.py), MLflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaclip_model.errors import InputError
from tasks.artifacts.artifact import Artifact
from tasks.join.config import STAGE as JOIN
from tasks.join.join import read_parts
from tasks.lineage.journal import JOURNALS, runs_of_digest
from tasks.register.aliases import RegisteredVersion
from tasks.register.config import STAGE as REGISTER
from tasks.train.config import STAGE as TRAIN


@dataclass(frozen=True)
class Model:
    """A trained model."""

    name: str
    """Of the training stage that made it."""
    digest: str
    registered: tuple[RegisteredVersion, ...]


def parent_of(artifact: Artifact, role: str, artifacts: Sequence[Artifact]) -> Artifact:
    """The artifact that `artifact` was made from.

    Raises:
        InputError: it is not there any more.
    """
    digest = artifact.parents[role]
    for other in artifacts:
        if other.digest == digest:
            return other
    raise InputError(
        f"{artifact.folder} was made from {role} {digest}, which is gone: run its recipe again"
    )


def ancestors_of(data: Artifact, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """What a verification or a join was made of, in the order of work, itself the last.

    Raises:
        InputError: something of it is not there any more.
    """
    if data.kind != JOIN.name:
        downloaded = parent_of(data, "download", artifacts)
        return [parent_of(downloaded, "merge", artifacts), downloaded, data]
    parts = parts_of(data, artifacts)
    return [*(one for part in parts for one in ancestors_of(part, artifacts)), data]


def parts_of(data: Artifact, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """The verifications in a join, in its order; a verification is its own one part.

    Raises:
        InputError: one of them is not there any more.
    """
    if data.kind != JOIN.name:
        return [data]
    return [parent_of(data, role, artifacts) for role in data.parents]


def places_of(verified: Artifact, artifacts: Sequence[Artifact]) -> dict[str, int]:
    """Digest -> first row of a verification's samples, in its own index and in every join of it."""
    places = {verified.digest: 0}
    for artifact in artifacts:
        if artifact.kind == JOIN.name:
            for part in read_parts(artifact.folder):
                if part.digest == verified.digest:
                    places[artifact.digest] = part.first_row
    return places


def children_of(digest: str, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """What was made directly of an artifact, in its order."""
    return [artifact for artifact in artifacts if digest in artifact.parents.values()]


def models_of(dataset: Artifact, artifacts: Sequence[Artifact]) -> list[Model]:
    """Every model trained on a dataset version, or started from such a model, in their order."""
    models: list[Model] = []
    waiting = [dataset.digest]
    while waiting:
        made_from = waiting.pop(0)
        for artifact in artifacts:
            known = any(model.digest == artifact.digest for model in models)
            if artifact.kind == TRAIN.name and made_from in artifact.parents.values() and not known:
                waiting.append(artifact.digest)
                versions = _registered(artifact, artifacts)
                models.append(Model(str(artifact.config["name"]), artifact.digest, versions))
    return models


def describe_model(model: Model, root: Path) -> Iterator[str]:
    """A model as lines for a person: where it is, its runs in tracking, its registered versions
    with the aliases that they have now (which asks the registry)."""
    yield f"  model     {model.name} {model.digest}"
    for run in runs_of_digest(root / JOURNALS, model.digest):
        yield f"    run     {run}"
    for version in model.registered:
        yield f"    version {version}{_aliases(version)}"


def _aliases(version: RegisteredVersion) -> str:
    aliases = version.aliases()
    if aliases is None:
        return f" (its aliases are unknown: {version.tracking_uri} does not answer)"
    return "".join(f" @{alias}" for alias in aliases)


def _registered(model: Artifact, artifacts: Sequence[Artifact]) -> tuple[RegisteredVersion, ...]:
    return tuple(
        RegisteredVersion.of(artifact.folder)
        for artifact in artifacts
        if artifact.kind == REGISTER.name and artifact.parents.get("train") == model.digest
    )
