"""Everything that artifacts were made from, as one document that can travel with a model.

Not here: what was made of an artifact (flows/graph/ancestry.py), pictures (tasks/lineage).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from tasks.artifacts.artifact import Artifact, read_artifact

LINEAGE = "lineage.json"


class Node(Config):
    """One artifact, as its manifest describes it."""

    kind: str
    name: str = ""
    """Of the stage, where a recipe has several of its kind; of features their model."""
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
        name = artifact.config.get("name")
        if artifact.kind == "embed":  # its address knows the model's weights alone
            name = json.loads((artifact.folder / "report.json").read_text())["model"]
        fields = artifact.model_dump(include=cls.model_fields.keys() - {"name"})
        return cls(name=name if isinstance(name, str) else "", **fields)


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
