"""From artifacts to what MLflow stores: parameters, metrics, tags, datasets.

Covers: pure functions over addresses and artifacts, within MLflow's limits on names and lengths.
Not here: MLflow itself (shipper.py), the journal (journal.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tasks.artifacts.artifact import CARD, MANIFEST, Address, Artifact
from tasks.artifacts.provenance import flatten_settings

PREFIX = "evaclip."
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
_NOT_IN_A_NAME = re.compile(r"[^\w\-./ :]", re.ASCII)


def metric_name(name: str) -> str:
    """`name` with every character that MLflow refuses replaced by `_`."""
    return _NOT_IN_A_NAME.sub("_", name).strip("/")


def flatten_config(config: Mapping[str, Any]) -> dict[str, str]:
    """A nested config as flat parameters: `a.b.c` -> text."""
    return {
        metric_name(key): _format_value(value)[:MAX_PARAM_CHARS]
        for key, value in flatten_settings("", config)
    }


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def stage_tags(address: Address, reused: bool) -> dict[str, str]:
    """Tags that identify a stage's run: its digest, its parents', and whether it was reused."""
    parents = {f"parent.{role}": digest for role, digest in address.parents.items()}
    tags = {
        "stage": address.stage.name,
        "digest": address.digest,
        "stage_version": str(address.stage.version),
        "folder": str(address.folder),
        "reused": str(reused).lower(),
        **parents,
    }
    return {PREFIX + name: value[:MAX_TAG_CHARS] for name, value in tags.items()}


def count_metrics(artifact: Artifact) -> dict[str, float]:
    """An artifact's counts as metrics."""
    return {metric_name(name): float(count) for name, count in artifact.counts.items()}


def series_metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one line of `metrics.jsonl`, less its axes (step, time).

    What is nested gets the names on the way to it: `{"trust": {"vision": {"min": 0.1}}}` is
    `trust_vision_min`, items of a list go by their place.
    """
    rest = {name: value for name, value in line.items() if name not in ("step", "time")}
    return {metric_name(name): number for name, number in _iterate_numbers("", rest)}


def _iterate_numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _iterate_numbers(f"{prefix}_{key}" if prefix else str(key), inner)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _iterate_numbers(f"{prefix}_{place}", inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield prefix, float(value)


def describe_dataset(artifact: Artifact, context: str) -> dict[str, str]:
    """An artifact as an MLflow dataset: its digest, manifest and card as source, counts as profile.

    Args:
        artifact: what a stage reads.
        context: what it reads it for, in MLflow's column "context" (training, evaluation, …).
    """
    source = {"uri": (artifact.folder / MANIFEST).resolve().as_uri()}
    if CARD in artifact.files:
        source["card"] = (artifact.folder / CARD).resolve().as_uri()
    return {
        "name": artifact.kind,
        "digest": artifact.digest,
        "source_type": "local",
        "source": json.dumps(source),
        "profile": json.dumps(artifact.counts)[:16_000],
        "context": context,
    }


def outside_dataset(
    name: str, digest: str, uri: str, profile: Mapping[str, Any], context: str
) -> dict[str, str]:
    """Data that no stage made, such as an evaluation set, as an MLflow dataset."""
    return {
        "name": name,
        "digest": digest,
        "source_type": "local",
        "source": json.dumps({"uri": uri}),
        "profile": json.dumps(profile)[:16_000],
        "context": context,
    }


def write_note(text: str, links: Mapping[str, str]) -> str:
    """A run's description in Markdown: one sentence and its links."""
    lines = [text, *(f"[{name}]({address})" for name, address in links.items())]
    return "\n\n".join(line for line in lines if line)[:MAX_TAG_CHARS]
