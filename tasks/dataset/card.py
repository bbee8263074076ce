"""The card of a dataset version: its sources, its size, what was left out and why.

Covers: the Markdown of `card.md`, from the manifests of all that the version was made from.
Not here: any decision; figures are copied, never computed anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaclip_model.files import write_atomically
from tasks.artifacts.artifact import Artifact
from tasks.dataset.config import LEFT_OUT, TAKEN_DOWN, DatasetConfig

UNSTATED = "not stated in the recipe"
Counts = Mapping[str, int | float]


def write_card(
    path: Path,
    config: DatasetConfig,
    ancestors: Sequence[Artifact],
    counts: Counts,
    by_source: Mapping[str, Mapping[str, int]],
    takedowns: int,
) -> None:
    """Write the card of the version whose artifact is the folder of `path`.

    Args:
        path: of the card.
        config: the version's rules.
        ancestors: what it was made from, in the order of work: merges, downloads, adoptions and
            verifications; other kinds only appear in the list of digests.
        counts: the version's totals.
        by_source: what became of every source's verified samples.
        takedowns: entries of the takedown lists.
    """
    lines = [
        f"# Dataset {path.parent.name}",
        "",
        f"{counts['samples']:,} image-text pairs in {counts['shards']:,} shards "
        f"({counts['bytes'] / 1e9:,.2f} GB).",
        "",
        "For research. Captions and image addresses come from the collections below; every image "
        "keeps its owner's copyright. LAION says of its collections that they are not made for "
        "ready products.",
        "",
    ]
    if adoptions := [artifact for artifact in ancestors if artifact.kind == "adopt"]:
        lines += _adopted(adoptions, by_source)
    if merges := [artifact for artifact in ancestors if artifact.kind == "merge"]:
        lines += [*_source_lines(merges, by_source), *_filter_lines(merges)]
    if downloads := [artifact for artifact in ancestors if artifact.kind == "download"]:
        lines += _download_lines(downloads)
    lines += [*_left_out(config, counts, takedowns), *_made_from(ancestors)]
    write_atomically(path, "\n".join(lines) + "\n")


def _source_lines(
    merges: Sequence[Artifact], by_source: Mapping[str, Mapping[str, int]]
) -> Iterator[str]:
    yield from ("## Sources", "")
    heads = ["source", "files", "revision", "licence of the metadata", "rows read", "selected"]
    rows = []
    counts = _sum_counts(merges)
    newest = {source["name"]: source for merge in merges for source in merge.config["sources"]}
    for name, source in newest.items():
        read, selected = (counts.get(f"{name}.{what}", 0) for what in ("rows_read", "selected"))
        kept = by_source.get(name, {}).get("samples", 0)
        stated = [source.get(key) or UNSTATED for key in ("revision", "licence")]
        rows.append([name, f"`{source['files']}`", *stated, read, selected, kept])
    yield from _table_lines([*heads, "in this version"], rows)


def _adopted(
    adoptions: Sequence[Artifact], by_source: Mapping[str, Mapping[str, int]]
) -> Iterator[str]:
    yield from ("## Adopted sources", "")
    heads = ["source", "files", "revision", "licence", "shards", "no pairs", "in this version"]
    counts = _sum_counts(adoptions)
    newest = {source["name"]: source for one in adoptions for source in one.config["sources"]}
    rows = []
    for name, source in newest.items():
        stated = [source.get(key) or UNSTATED for key in ("revision", "licence")]
        found = [counts.get(f"{name}.{what}", 0) for what in ("shards", "left_out")]
        kept = by_source.get(name, {}).get("samples", 0)
        rows.append([name, f"`{source['files']}`", *stated, *found, kept])
    yield from _table_lines(heads, rows)


def _filter_lines(merges: Sequence[Artifact]) -> Iterator[str]:
    yield from ("## Rows that were not selected", "")
    prefix = "dropped."
    dropped = {
        name.removeprefix(prefix): n
        for name, n in _sum_counts(merges).items()
        if name.startswith(prefix)
    }
    yield from _table_lines(
        ["reason", "rows"], [[reason, rows] for reason, rows in dropped.items()]
    )
    filters = merges[-1].config["filters"]
    settings = ", ".join(f"{name} = {value!r}" for name, value in filters.items())
    yield from (f"Filters: {settings}.", "")


def _download_lines(downloads: Sequence[Artifact]) -> Iterator[str]:
    counts, last = _sum_counts(downloads), downloads[-1]
    yield from ("## Download", "")
    share = counts["samples"] / counts["rows"] if counts["rows"] else 0.0
    several = f" in {len(downloads)} downloads" if len(downloads) > 1 else ""
    yield (
        f"{counts['samples']:,} of {counts['rows']:,} images ({share:.1%}){several}, finished "
        f"{last.created}. Sites' refusals of such use were obeyed: X-Robots-Tag "
        f"{', '.join(last.config['disallowed_directives'])}."
    )
    yield ""
    prefix = "failed."
    failed = {name.removeprefix(prefix): n for name, n in counts.items() if name.startswith(prefix)}
    yield from _table_lines(
        ["failure", "rows"], [[reason, rows] for reason, rows in failed.items()]
    )


def _sum_counts(artifacts: Sequence[Artifact]) -> Counter[str]:
    """The counts of all of them together."""
    return sum((Counter(artifact.counts) for artifact in artifacts), Counter[str]())


def _left_out(config: DatasetConfig, counts: Counts, takedowns: int) -> Iterator[str]:
    yield from ("## Samples that are on disk but left out", "")
    prefix = "left_out."
    reasons = {
        name.removeprefix(prefix): n for name, n in counts.items() if name.startswith(prefix)
    }
    yield from _table_lines(
        ["reason", "samples"], [[reason, rows] for reason, rows in reasons.items()]
    )
    near = config.near_duplicates == "drop"
    compared = ", ".join(f"`{name}`" for name in config.evaluation_sets) or "none"
    yield from (
        f"- exact duplicates: {config.exact_duplicates}; near duplicates: "
        + (f"drop, up to {config.max_distance} of 64 bits" if near else "keep"),
        f"- evaluation sets whose images were looked for: {compared}",
        f"- blocklists: {len(config.blocklists)}; takedowns obeyed: {takedowns} (`{TAKEN_DOWN}`)",
        f"- sample by sample: `{LEFT_OUT}`",
        "",
    )


def _made_from(ancestors: Sequence[Artifact]) -> Iterator[str]:
    yield from ("## Made from", "")
    rows = [[artifact.kind, f"`{artifact.digest}`", artifact.created] for artifact in ancestors]
    yield from _table_lines(["stage", "digest", "finished"], rows)
    yield "Every shard's SHA-256 is in `shards.json`."


def _table_lines(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    if rows:
        yield f"| {' | '.join(heads)} |"
        yield "|---" * len(heads) + "|"
    for row in rows:
        cells = (f"{cell:,}" if isinstance(cell, int | float) else str(cell) for cell in row)
        yield f"| {' | '.join(cells)} |"
    yield from ("",) if rows else ("None.", "")
