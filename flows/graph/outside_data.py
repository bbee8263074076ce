"""Data that a recipe names and no step makes: finding it, and what stands for it in a digest.

A graph can be drawn and planned without it, but not be run.
Not here: which steps read it (flows/graph/graph.py).
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from evaclip_model.errors import InputError
from evaclip_model.reading.urls import is_url
from flows.config.profile import Profile
from flows.graph.step import ABSENT, Input, Step
from tasks.adopt.config import AdoptConfig, AdoptedSource
from tasks.adopt.find_source import find_source, source_mark
from tasks.artifacts.artifact import DIGEST_CHARS, Artifact, fingerprint_files
from tasks.artifacts.root_store import fetch_artifact
from tasks.evaluate.config import RESULTS
from tasks.initialise.config import REGISTRY
from tasks.lineage.stage_record import outside_dataset
from tasks.merge.config import MergeConfig, SourceConfig
from tasks.merge.metadata_files import find_metadata, remote_fingerprint

if TYPE_CHECKING:
    from tasks.dataset.choose import Asked

DEMO_PREFIX = "demo:"


class NotHere(InputError):
    """Outside data that a recipe names is not to be found from this machine."""


@dataclass(frozen=True)
class OutsideMarks:
    """Marks of the outside data of one step, and a sentence on everything that is absent."""

    demo: Step | None
    absent: list[str] = field(default_factory=list)

    def mark_files(self, pattern: str, where: str, edition: str = "") -> Input:
        """Return what stands for the files of `pattern`: the demo, or their fingerprint."""
        if pattern.startswith(DEMO_PREFIX) and self.demo is not None:
            return self.demo
        try:
            files = find_files(pattern, self.demo, where)
        except NotHere as error:
            return self.note_absent(f"{error}; it is {edition}" if edition else str(error))
        if is_url(pattern):
            return remote_fingerprint([str(url) for url in files])
        return hash_marks(fingerprint_files(Path(file)) for file in files)

    def find_version(self, tracking_uri: str, uri: str) -> tuple[str, str]:
        """(NAME/VERSION of `models:/NAME@ALIAS` or `models:/NAME/VERSION`, mark of its weights)."""
        from tasks.register.model_versions import describe_version  # imports mlflow
        from tasks.register.promotion import WEIGHTS_TAG

        try:
            version = describe_version(tracking_uri, uri)
        except InputError as error:
            return uri, self.note_absent(f"{uri}: {error}")
        return str(version), hash_marks([version.tags.get(WEIGHTS_TAG, str(version))])

    def mark_source(self, source: AdoptedSource) -> str:
        return self.mark_found(lambda: source_mark(find_source(source)))

    def mark_found(self, look: Callable[[], str]) -> str:
        """The mark that `look` finds."""
        try:
            return look()
        except InputError as error:
            return self.note_absent(str(error))

    def note_absent(self, sentence: str) -> str:
        """Note that something is absent; returns what stands for it."""
        self.absent.append(sentence)
        return ABSENT


def fingerprint_model(spec: str) -> str:
    """Return what stands for a model in a digest: its files' fingerprint, or its library's name."""
    from tasks.encoders.open_models import OPEN_CLIP, files_of  # imports torch

    files = files_of(spec)
    missing = [path for path in files if not path.exists()]
    if not spec.startswith(OPEN_CLIP) and (missing or not files):
        raise InputError(f"model '{spec}' is not there: {', '.join(map(str, missing)) or 'empty'}")
    marks = [fingerprint_files(path) for path in files if path.exists()]
    return "-".join([*marks, spec]) if spec.startswith(OPEN_CLIP) else "-".join(marks)


def fetch_model(spec: str, profile: Profile) -> str:
    """The spec; of a registered model its folder, under the root."""
    if not spec.startswith(REGISTRY):
        return spec
    from tasks.register.model_registry import pull_model  # imports mlflow

    model = spec.removeprefix(REGISTRY)
    folder = profile.root.resolve() / "cache" / "models" / model.replace("/", "-")
    return str(pull_model(profile.mlflow_uri, model, folder, places=profile.weight_places))


def hash_marks(marks: Iterable[str], between: str = "") -> str:
    """One mark for several, in their order."""
    return hashlib.sha256(between.join(marks).encode()).hexdigest()[:DIGEST_CHARS]


def find_files(pattern: str, demo: Step | None, where: str) -> list[Path] | list[str]:
    """The files (a folder; of a URL, URLs) that a recipe's pattern names, in which `demo:` is the
    demo artifact's folder; raises NotHere where nothing matches."""
    if pattern.startswith(DEMO_PREFIX):
        if demo is None:
            raise InputError(f"{where}: '{pattern}' needs a [demo] table in the recipe")
        folder = glob.escape(str(fetch_artifact(demo.folder)))
        pattern = str(Path(folder) / pattern.removeprefix(DEMO_PREFIX))
    try:
        found = find_metadata(pattern, where)
    except InputError as error:
        raise NotHere(str(error)) from error
    return found if is_url(pattern) else [*map(Path, found)]


def find_all(patterns: Sequence[str], demo: Step | None, where: str) -> list[Path]:
    """The files (or folders) of several patterns, as `find_files`; a URL is refused."""
    found = []
    for path in (path for pattern in patterns for path in find_files(pattern, demo, where)):
        if isinstance(path, str):
            raise InputError(f"{where}: '{path}' is a URL; give a copy of it on this machine")
        found.append(path)
    return found


def describe_sources(made: Artifact, config: MergeConfig | AdoptConfig) -> list[dict[str, str]]:
    """The sources that a finished merge or adoption read, as tracking's datasets."""
    found = []
    for one in config.sources:
        if (mark := made.parents.get(one.name)) is not None:
            key, size, context = "shards", made.counts.get(f"{one.name}.shards"), "adopted"
            if isinstance(one, SourceConfig):
                key, size, context = "target_count", one.target_count, "metadata"
            found.append(outside_dataset(one.name, mark, one.files, {key: size}, context))
    return found


def describe_sets(evaluated: Artifact, folders: Mapping[str, Path]) -> list[dict[str, str]]:
    """The evaluation sets that a finished evaluation read, as tracking's datasets."""
    from tasks.evaluate.report.findings import Findings  # imports torch

    found, described = Findings(json.loads((evaluated.folder / RESULTS).read_text())), []
    for name in (one for one in folders if one in found.sets):
        about = found.describe_set(name)
        size = {key: about[key] for key in ("n", "classes", "prompts_digest")}
        uri = folders[name].resolve().as_uri()
        described.append(outside_dataset(name, about["fingerprint"], uri, size, "evaluation"))
    return described


def sort_takedowns(entries: Iterable[str]) -> Asked:
    """Entries of takedown lists by kind, as the index has them; URLs as they are, which earlier
    merges may have written, and in their present normal form."""
    from tasks.dataset.choose import sort_by_kind  # imports duckdb, as the next ones do
    from tasks.index.sample_index import Kind
    from tasks.merge.database import normal_urls

    by_kind = dict(sort_by_kind(entries))
    if by_kind[Kind.URL]:
        normal = [url for url in normal_urls(by_kind[Kind.URL]) if url is not None]
        by_kind[Kind.URL] = tuple(dict.fromkeys([*by_kind[Kind.URL], *normal]))
    return by_kind
