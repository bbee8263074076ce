"""Versions of registered models by the names that people use, their present aliases and lineage.

All that asks the registry raises InputError where there is none, or it does not answer.
Not here: fetching the model (model_registry.py), which version is in use (promotion.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from evaclip_model.errors import InputError, shorten_error
from tasks.artifacts.artifact import LINEAGE, Lineage
from tasks.register.config import REGISTERED
from tasks.register.promotion import DIGEST_TAG, NAME_TAG, champion_history, history
from tasks.tracking import TrackingStore, find_answer, read_all_pages

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_MODELS = "models:/"


@dataclass(frozen=True)
class RegisteredVersion:
    name: str
    version: int
    tracking_uri: str
    """Of the store whose registry has it."""

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    @classmethod
    def from_registration(cls, folder: Path) -> Self:
        one = json.loads((folder / REGISTERED).read_text())
        return cls(one["name"], int(one["version"]), one["tracking_uri"])

    def current_aliases(self) -> tuple[str, ...] | None:
        """Its aliases of now, by name; None if its registry does not answer."""
        with suppress(InputError), open_registry(self.tracking_uri) as (_, client):
            version = find_answer(client.get_model_version, self.name, str(self.version))
            return tuple(sorted(version.aliases)) if version else ()
        return None


@dataclass(frozen=True)
class Described(RegisteredVersion):
    """A version with what it was made from."""

    aliases: tuple[str, ...]
    created: int
    """UNIX time in milliseconds."""
    tags: dict[str, str]
    lineage: Lineage | None
    no_lineage: str = ""
    """Why there is none, and what to do."""


def is_address(text: str) -> bool:
    """True for NAME@ALIAS and NAME/VERSION, also after `models:/`; digits alone are a digest."""
    name, _, version = text.rpartition("/")
    return text.startswith(_MODELS) or "@" in text or bool(name and version.isdecimal())


@contextmanager
def open_registry(tracking_uri: str) -> Iterator[tuple[TrackingStore, MlflowClient]]:
    """The registry at an address that has one."""
    store = TrackingStore.at(tracking_uri, experiment="")
    if store.database is not None and not store.database.is_file():
        raise InputError(
            f"there is no registry at {store.uri}: run the pipeline first, or name its address "
            "in EVACLIP_TRACKING_URI"
        )
    with store.connect() as client:
        yield store, client


def resolve_version(client: MlflowClient, model: str) -> ModelVersion:
    """The version that `NAME@ALIAS` or `NAME/VERSION` means, or one sentence with what there is."""
    model = model.removeprefix(_MODELS)
    name, at, alias = model.partition("@")
    name, _, number = (name, "", "") if at else model.partition("/")
    registered = find_answer(client.get_registered_model, name)
    if registered is None:
        names = ", ".join(
            sorted(one.name for one in read_all_pages(client.search_registered_models))
        )
        raise InputError(f"no model '{name}' is registered; there are: {names or 'none yet'}")
    known = read_all_pages(client.search_model_versions, f"name='{name}'")
    versions = sorted(int(one.version) for one in known)
    if alias in registered.aliases:
        number = str(registered.aliases[alias])
    if number.isdecimal() and int(number) in versions:
        return client.get_model_version(name, number)
    aliases = ", ".join(f"{name}@{one}" for one in sorted(registered.aliases)) or "no alias"
    numbers = ", ".join(f"{name}/{one}" for one in versions) or "no version"
    wrong = "is not a version" if at or number else "lacks an alias or a version"
    raise InputError(f"'{model}' {wrong}; there are: {aliases}; {numbers}")


def describe_version(tracking_uri: str, model: str) -> Described:
    with open_registry(tracking_uri) as (store, client):
        return _make_description(store, client, resolve_version(client, model))


def find_predecessor(tracking_uri: str, version: Described, alias: str) -> Described | None:
    """The version that had the alias before this one got it; for one that never had it, the one
    that has it now; None if there is no other."""
    with open_registry(tracking_uri) as (store, client):
        line = champion_history(history(store, version.name, alias))
        if version.version in line:
            line = line[: line.index(version.version)]
        if not line:
            return None
        found = client.get_model_version(version.name, str(line[-1]))
        return _make_description(store, client, found)


def check_models(tracking_uri: str) -> Iterator[tuple[str, str]]:
    """NAME@ALIAS of every version that is in use here, and what is wrong with its files."""
    with open_registry(tracking_uri) as (store, client):
        for model in read_all_pages(client.search_registered_models, f"tags.`{NAME_TAG}` != ''"):
            for alias, number in sorted(model.aliases.items()):
                said = ""
                try:
                    list_files(store, client.get_model_version_download_uri(model.name, number))
                except InputError as error:
                    said = str(error)
                yield f"{model.name}@{alias}", said


def made_from(tracking_uri: str, digest: str) -> list[str]:
    """NAME/VERSION of every version whose lineage has this digest, by its tags."""
    with open_registry(tracking_uri) as (_, client):
        return [
            f"{version.name}/{version.version}"
            for version in read_all_pages(client.search_model_versions)
            if any(one == digest for tag, one in version.tags.items() if tag.startswith(DIGEST_TAG))
        ]


def _make_description(
    store: TrackingStore, client: MlflowClient, version: ModelVersion
) -> Described:
    from mlflow.artifacts import download_artifacts

    source = client.get_model_version_download_uri(version.name, version.version)
    lineage, files, why = None, dict[str, int](), f"it was registered without {LINEAGE}"
    try:
        files = list_files(store, source)
    except InputError as error:
        why = str(error)
    if LINEAGE in files:
        with tempfile.TemporaryDirectory() as folder:
            place = {"artifact_uri": f"{source}/{LINEAGE}", "tracking_uri": store.uri}
            text = Path(download_artifacts(**place, dst_path=folder)).read_text()
        lineage = Lineage.from_mapping(json.loads(text), where=LINEAGE)
    return Described(
        *(version.name, int(version.version), store.uri, tuple(sorted(version.aliases))),
        *(version.creation_timestamp, dict(version.tags), lineage, why),
    )


def list_files(store: TrackingStore, source: str) -> dict[str, int]:
    """Name -> bytes of a version's files. InputError: there are none at its place."""
    from mlflow.artifacts import list_artifacts

    try:
        files = list_artifacts(artifact_uri=source, tracking_uri=store.uri)
    except Exception as error:  # every store has its own kinds
        raise InputError(
            f"the model's files at {source} cannot be listed ({shorten_error(error)}): check the "
            "credentials in the environment"
        ) from error
    if not files:
        raise InputError(
            f"the model's files are not at {source}, where they were registered: leave a link "
            "there to a folder that was moved (`ln -s NEW OLD`), as MLflow keeps absolute places; "
            "what another tool registered cannot be pulled or compared with"
        )
    return {Path(file.path).name: file.file_size or 0 for file in files}
