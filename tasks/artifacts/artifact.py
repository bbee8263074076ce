"""Artifacts, which stages hand on: a folder whose `manifest.json` is written last.

An artifact is input-addressed: its digest is a hash of the stage's name and version, its config
and its parents' digests, so the whole chain of addresses is known before anything runs. A folder
with a manifest is finished; without one it is unfinished, and its stage continues or starts again.

Everything that artifacts were made from is one document, `Lineage`, that can travel with a model.
Not here: what was made of an artifact (flows/graph/ancestry.py), pictures (tasks/lineage).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Self

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.files import lock_file, refuse_special, write_atomically
from tasks.artifacts.lease import hold_lease
from tasks.artifacts.root_store import (
    BULK as BULK,
    LOCK,
    MANIFEST as MANIFEST,
    PRUNED as PRUNED,
    ROOT_LOCK as ROOT_LOCK,
    Outbox,
    fetch_artifact,
)
from tasks.progress import Report, report_nothing

CARD = "card.md"
INPUTS = "inputs.json"
"""Source -> marks of the files that a merge or an adoption took."""
DIGEST_CHARS = 16
FINGERPRINT_BYTES = 1 << 20
Counts = Mapping[str, int | float]
LINEAGE = "lineage.json"


class Role:
    """Names of inputs among an artifact's parents, part of its digest; outside data has roles of
    its own, such as a source's name."""

    MERGE = "merge"
    DOWNLOAD = "download"
    ADOPT = "adopt"
    DATA = "verify"
    """What a dataset version chooses from: a verification, or several that were joined."""
    PART = "part"
    """Of a join, with four digits behind."""
    SCORES = "scores"
    """Features whose scores decide, with four digits behind."""
    JUDGED = "judged"
    """Likewise, of those parts of a retraining's data that a champion has judged."""
    BASE = "base"
    """The dataset version whose choice is taken over."""
    DATASET = "dataset"
    TEACHER = "teacher"
    """Features that a training stage learns from, with four digits behind."""
    START = "start_from"
    END = "end"
    TRAINED = "train"
    EVALUATION = "evaluate"
    UNTRAINED = "initialise"
    CHAMPION = "champion"
    """Outside data, like the next ones: the first characters of its weights' SHA-256."""
    TAKEDOWNS = "takedowns"
    GIVEN = "given"
    """The merges whose rows an increment leaves out, together."""
    TRACKING = "tracking"
    SUBJECT = "subject"


@dataclass(frozen=True)
class Stage:
    """One kind of work; `version` rises when its output would differ for the same input."""

    name: str
    version: int
    tools: tuple[str, ...] = ()
    """Distributions whose version belongs in the manifest."""
    ignores: tuple[str, ...] = ()
    """Config fields that decide how the work is done (memory, parallelism), never its result."""


@dataclass(frozen=True)
class Address:
    """The place where an artifact is or will be, and everything that decides its content."""

    root: Path
    stage: Stage
    config: Mapping[str, Any]
    parents: Mapping[str, str] = field(default_factory=dict)
    """Role -> digest of the artifact (or fingerprint of the outside file) it is made from."""

    @classmethod
    def of(
        cls, root: Path, stage: Stage, config: Config, parents: Mapping[str, str] | None = None
    ) -> Address:
        identity = config.compute_identity()
        decides = {name: value for name, value in identity.items() if name not in stage.ignores}
        return cls(root, stage, decides, dict(parents or {}))

    @property
    def digest(self) -> str:
        decides = {
            "stage": self.stage.name,
            "version": self.stage.version,
            "config": self.config,
            "parents": dict(self.parents),
        }
        text = json.dumps(decides, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]

    @property
    def folder(self) -> Path:
        return self.root / self.stage.name / self.digest

    @property
    def is_finished(self) -> bool:
        return (self.folder / MANIFEST).is_file()


class Artifact(Config):
    """A finished artifact: what flows pass between stages."""

    kind: str
    """Name of the stage that made it."""
    digest: str
    folder: Path
    parents: dict[str, str]
    config: dict[str, Any]
    counts: dict[str, int | float]
    """Totals for people and for tracking: rows, samples, shards, bytes, reasons."""
    files: dict[str, dict[str, int | str]]
    """Path inside the folder -> {size, sha256} of every file that the artifact consists of, but
    for bulk files, whose list is among them."""
    created: str
    """UTC time of publication, ISO 8601."""


@dataclass(frozen=True)
class Made:
    """The report of a stage's pure function: totals, and the files its artifact consists of."""

    counts: Counts
    files: tuple[Path, ...]
    """Hashed when the artifact is published."""
    bulk: tuple[Path, ...] = ()
    """Files that are not: two billion samples are 50 TB of shards, which a later stage reads to
    their end and hashes then. Their sizes go into the list `BULK`, which is hashed."""


def produce_artifact(
    address: Address, make: Callable[[Path], Made], report: Report = report_nothing
) -> Artifact:
    """Return the artifact at `address`, calling `make(folder)` only when it is not finished: it may
    find the leavings of a killed run, and continues or clears them. Of a root at a URL what is made
    is put there."""
    if address.is_finished:
        return read_artifact(address.folder)
    folder = address.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / LOCK)
        if lock is None:
            raise InputError(f"another run is making {folder}: wait for it, or stop it first")
        with lock, hold_lease(folder, report) as check:
            if address.is_finished:
                return read_artifact(folder)
            return _publish_manifest(address, make(folder), check, report)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"the disk is full at {folder}: free some space and run the same command again; "
                "what is finished is kept"
            ) from error
        raise


def read_artifact(folder: Path) -> Artifact:
    """Read an artifact that is finished, or was until its files were pruned."""
    path = folder / MANIFEST
    if not path.exists() and (folder / PRUNED).exists():
        path = folder / PRUNED
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} is not a finished artifact: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): delete the folder and run again"
        ) from None
    fields = {key: manifest[key] for key in Artifact.model_fields if key in manifest}
    return Artifact.from_mapping({**fields, "folder": folder}, where=str(path))


def read_artifacts(root: Path) -> list[Artifact]:
    """Every artifact under `root` that is or was finished, in the order in which they were made."""
    folders = {path.parent for name in (MANIFEST, PRUNED) for path in root.glob(f"*/*/{name}")}
    found = map(read_artifact, folders)
    return sorted(found, key=lambda artifact: (artifact.created, artifact.digest))


def read_bulk(folder: Path) -> dict[Path, int] | None:
    """Size in bytes of every bulk file that a finished artifact lists; None if it has no list."""
    path = folder / BULK
    if not path.exists():
        return None
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        return {folder / entry["path"]: int(entry["size"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): delete {folder} and run again"
        ) from None


def read_inputs(folder: Path) -> dict[str, set[str]]:
    """Source -> marks of the files that a finished merge has read or an adoption has taken; none
    for one of before there was such a list."""
    path = fetch_artifact(folder, INPUTS) / INPUTS
    known = json.loads(path.read_text()) if path.is_file() else {}
    return {name: set(marks) for name, marks in known.items()}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_files(path: Path) -> str:
    """Identity of an outside file, or of all files in a folder: size, first and last MiB of each.

    Hashing 400 GB of metadata before every run would cost more than the merge; parquet keeps its
    row counts and statistics at the end, safetensors its list of tensors at the beginning.
    """
    refuse_special(path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            digest.update(content.read(FINGERPRINT_BYTES))
            content.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(content.read())
    return digest.hexdigest()[:DIGEST_CHARS]


def _publish_manifest(
    address: Address, made: Made, check: Callable[[], None], report: Report
) -> Artifact:
    folder, outbox = address.folder, Outbox(address.folder)
    files = [*made.files]
    if made.bulk:
        sizes = {str(one.relative_to(folder)): outbox.state_of(one)[0] for one in made.bulk}
        lines = [json.dumps({"path": path, "size": size}) + "\n" for path, size in sizes.items()]
        write_atomically(folder / BULK, "".join(lines))
        files.append(folder / BULK)
    files.sort()
    # A core each at once, because hashing leaves Python's lock.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "hashing") as pool:
        hashes = list(pool.map(sha256_of, files))
    manifest = {
        "kind": address.stage.name,
        "version": address.stage.version,
        "digest": address.digest,
        "parents": dict(address.parents),
        "config": address.config,
        "counts": dict(made.counts),
        "files": {
            str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256}
            for path, sha256 in zip(files, hashes, strict=True)
        },
        "tools": {name: metadata.version(name) for name in address.stage.tools},
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    text = json.dumps(manifest, indent=1) + "\n"
    outbox.publish_files(files, made.bulk, text, check, report)
    write_atomically(folder / MANIFEST, text)
    (folder / PRUNED).unlink(missing_ok=True)
    return read_artifact(folder)


class Node(Config):
    """One artifact, as its manifest describes it."""

    kind: str
    name: str = ""
    """Of the stage, where a recipe has several of its kind."""
    model: str = ""
    """Of features: what made them, whose weights alone their address knows."""
    digest: str
    created: str
    parents: dict[str, str]
    """Role -> digest of another node, or fingerprint of outside data."""
    counts: dict[str, int | float]
    config: dict[str, Any]

    @property
    def label(self) -> str:
        """`train.stage-1`, or the kind alone."""
        return f"{self.kind}.{self.name}" if self.name else self.kind

    @property
    def title(self) -> str:
        """The label for people: `train stage-1`, or the kind alone."""
        return self.label.replace(".", " ", 1)

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Self:
        name, model = artifact.config.get("name"), ""
        if artifact.kind == "embed":
            model = json.loads((artifact.folder / "report.json").read_text())["model"]
        fields = artifact.model_dump(include=cls.model_fields.keys() - {"name", "model"})
        return cls(name=name if isinstance(name, str) else "", model=model, **fields)


class Lineage(Config):
    """The artifacts that some were made from, themselves included."""

    heads: tuple[str, ...]
    """Digests of the artifacts that were asked for."""
    nodes: tuple[Node, ...]
    """Every artifact once, each behind all that it was made from."""

    def find_node(self, digest: str) -> Node | None:
        """The node of a digest; None for outside data."""
        return next((node for node in self.nodes if node.digest == digest), None)

    def outside_fingerprints(self) -> dict[str, str]:
        """`KIND.ROLE` -> fingerprint of all data that came from outside."""
        return {
            f"{node.label}.{role}": digest
            for node in self.nodes
            for role, digest in node.parents.items()
            if self.find_node(digest) is None
        }

    def unique_labels(self) -> dict[str, str]:
        """A name of its own for every digest: its label, then its label and digest."""
        digests: dict[str, str] = {}
        for node in reversed(self.nodes):
            taken = node.label in digests
            digests[f"{node.label}.{node.digest}" if taken else node.label] = node.digest
        return {**digests, **self.outside_fingerprints()}

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def lineage_of(artifacts: Sequence[Artifact], root: Path) -> Lineage:
    """Everything that `artifacts` were made from, as far as it is under `root`."""

    def find(digest: str) -> Artifact | None:
        for folder in root.glob(f"*/{digest}"):
            with suppress(InputError):
                return read_artifact(folder)
        return None

    nodes = tuple(map(Node.from_artifact, walk_up(artifacts, find).values()))
    return Lineage(heads=tuple(a.digest for a in artifacts), nodes=nodes)


def walk_up(
    artifacts: Iterable[Artifact], find: Callable[[str], Artifact | None]
) -> dict[str, Artifact]:
    """Everything that `artifacts` were made from, by digest, themselves included, each behind all
    that it was made from; `find` gives the artifact of a digest, None for outside data."""
    found: dict[str, Artifact] = {}

    def visit(artifact: Artifact) -> None:
        for digest in artifact.parents.values():
            if digest not in found and (parent := find(digest)):
                visit(parent)
        found.setdefault(artifact.digest, artifact)

    for artifact in artifacts:
        visit(artifact)
    return found


class Change(NamedTuple):
    """One difference between two lineages; None stands for what one of them does not have."""

    where: str
    """`train.stage1: lr_vision`, `merge: laion2b` (outside data), `train.stage3` (a stage)."""
    old: Any
    new: Any


def list_changes(old: Lineage, new: Lineage) -> list[Change]:
    """Return what decides a result and differs, in the new one's order: settings, outside data,
    stages (by their labels); not what follows from a change, such as digests."""
    before, after = ({node.label: node for node in one.nodes} for one in (old, new))
    found: list[Change] = []
    for label in dict.fromkeys((*after, *before)):
        one, other = before.get(label), after.get(label)
        if one is None or other is None:
            found.append(Change(label, one and one.digest, other and other.digest))
            continue
        was, now = _deciding_settings(one, old), _deciding_settings(other, new)
        found += [
            Change(f"{label}: {key}", was.get(key), now.get(key))
            for key in dict.fromkeys((*now, *was))
            if was.get(key) != now.get(key)
        ]
    return found


def _deciding_settings(node: Node, lineage: Lineage) -> dict[str, Any]:
    """A node's settings, flat, and the fingerprints of its outside data."""
    outside = {r: digest for r, digest in node.parents.items() if not lineage.find_node(digest)}
    return dict(flatten_settings("", node.config)) | outside


def flatten_settings(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Nested settings as pairs: `a.b.c` and a value that is not a table.

    Lists of tables are numbered, or go by their `name`; lists of plain values stay one value.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten_settings(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for place, item in enumerate(value):
            name = item.get("name", place) if isinstance(item, Mapping) else place
            yield from flatten_settings(f"{prefix}.{name}", item)
    else:
        yield prefix, value
