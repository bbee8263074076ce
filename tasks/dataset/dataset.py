"""One version of the data: which verified samples are used, as training reads it: the manifest with
tombstones, the list of what is left out, the card, whose figures are those of its ancestors.

Not here: which samples a rule leaves out (choose.py); looking into shards; making a new download.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from jinja2 import Environment, StrictUndefined

from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.reading.samples import (
    SHARDS,
    TOMBSTONES,
    VALIDATION_SHARDS,
    Shard,
    ShardManifest,
    append_tombstones,
)
from tasks.artifacts.artifact import CARD, Artifact, Counts, Made
from tasks.dataset import choose as choosing
from tasks.dataset.config import (
    CAPTIONS,
    LEFT_OUT,
    REPORT,
    RULES_IN_FILES,
    SEARCH,
    TAKEN_DOWN,
    DatasetConfig,
    OutsideFiles,
    Seen,
)
from tasks.dataset.scores import SCORE_PARTS, Rows
from tasks.dataset.sidecars import shard_captions, write_sidecars
from tasks.index.sample_index import (
    INDEX,
    SampleIndex,
    ShardVerdict,
    link_or_copy,
    read_verdicts,
    relative_path,
    shard_location,
)
from tasks.progress import Report


@dataclass(frozen=True)
class Takedowns:
    """Samples that may be used no longer."""

    entries: tuple[str, ...] = ()
    find: Callable[[SampleIndex], Rows] | None = None
    """Finds their rows, apart from those that `before` leaves out already."""
    before: Path | None = None
    """Folder of a version of the same data by the same rules that obeys none or some of these
    takedowns, if there is one: its choice is taken over, because takedowns only add to it."""


def make_dataset(
    config: DatasetConfig,
    ancestors: Sequence[Artifact],
    outside: OutsideFiles,
    takedowns: Takedowns,
    out: Path,
    report: Report,
    seen: Seen | None = None,
    base: Path | None = None,
) -> Made:
    """Write the version into `out`; nothing of the shards is read again or rewritten.

    What is chosen from is the last of `ancestors`, which are in the order of work, that has an
    index; `seen` are its features, where a rule asks for them. `base` is the folder of a version by
    the same rules without those of scores and without takedowns, whose choice is taken over.
    InputError: a list or an evaluation set cannot be read, or nothing is left."""
    verified = next(one.folder for one in reversed(ancestors) if (one.folder / INDEX).is_dir())
    index = SampleIndex(verified, config.memory_limit)
    verdicts = read_verdicts(verified)
    report(0, 3, f"{index.rows:,} samples")
    before = takedowns.before
    known = json.loads((before / REPORT).read_text()) if before else {}
    if (taken_over := before or base) is not None:
        choice = choosing.Choice.from_table(index.rows, pq.read_table(taken_over / LEFT_OUT))
    else:
        choice = choosing.choose_samples(index, verdicts, config, outside)
        if config.asks_features and seen is not None:
            from tasks.dataset.semantic import leave_out_near  # imports torch

            leave_out_near(choice, config, seen, outside.evaluation_sets, out, report)
    scored: dict[str, list[int]] = known.get("scores", {})
    if before is None and seen is not None:
        scored = choosing.leave_out_low_scores(choice, index, verdicts, config, seen)
    report(1, 3, "takedowns")
    if takedowns.find is not None:
        choice.leave_out(takedowns.find(index), choosing.LeftOutReason.TAKEDOWN)
    shutil.rmtree(out / CAPTIONS, ignore_errors=True)
    captions: dict[str, dict[str, int]] = known.get(CAPTIONS, {})
    if before is not None and (before / CAPTIONS).is_dir():
        shutil.copytree(before / CAPTIONS, out / CAPTIONS, copy_function=link_or_copy)
    elif outside.captions:
        captions = write_sidecars(index, outside.captions, out, report)
    report(2, 3, "manifest")
    held_out = choosing.find_held_out(index, config.validation_share) & ~choice.left_out
    with (out / TOMBSTONES).open("wb") as bits:
        keep_shards = partial(_keep_shards, verdicts, verified, choice, bits)
        shards, by_source = keep_shards(choice.left_out | held_out)
        validation, _ = keep_shards(~held_out) if held_out.any() else ((), {})
    if not shards:
        reasons = choice.count_reasons(0, index.rows).items()
        said = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
        raise InputError(f"nothing is left of {index.rows:,} samples: {said}")
    ShardManifest(shards=shards).write(out / SHARDS)
    names: tuple[str, ...] = (SHARDS, TOMBSTONES, LEFT_OUT, TAKEN_DOWN, REPORT, CARD)
    if validation:
        ShardManifest(shards=validation).write(out / VALIDATION_SHARDS)
        names += (VALIDATION_SHARDS,)
    pq.write_table(choice.to_table(), out / LEFT_OUT, compression="zstd")
    write_atomically(out / TAKEN_DOWN, "".join(f"{entry}\n" for entry in takedowns.entries))
    counts = _count_samples(index.rows, shards, choice, by_source, int(held_out.sum()))
    for name, number in _never_packed(ancestors).items():
        counts[name] = counts.get(name, 0) + number
    counts |= {
        f"{CAPTIONS}.{name}.{what}": n for name, one in captions.items() for what, n in one.items()
    }
    rules = config.model_dump(include=set(RULES_IN_FILES))
    details = {**counts, "sources": by_source, "rules": rules, CAPTIONS: captions, "scores": scored}
    write_atomically(out / REPORT, json.dumps(details, indent=1) + "\n")
    write_card(
        out / CARD, config, ancestors, counts, by_source, captions, scored, takedowns.entries
    )
    shutil.rmtree(out / SEARCH, ignore_errors=True)
    report(3, 3, f"{counts['samples']:,} samples")
    further = tuple(sorted((out / CAPTIONS).glob("*")))
    return Made(counts, tuple(out / name for name in names), further)


def _keep_shards(
    verdicts: Sequence[ShardVerdict],
    verified: Path,
    choice: choosing.Choice,
    bits: BinaryIO,
    hidden: npt.NDArray[np.bool_],
) -> tuple[tuple[Shard, ...], dict[str, dict[str, int]]]:
    """Shards with anything in them that is not `hidden` [rows], as seen from the folder of `bits`,
    which gets their tombstones; and by source what became of its samples."""
    out = Path(bits.name).parent
    shards: list[Shard] = []
    by_source: dict[str, Counter[str]] = {}
    start = 0
    for number, verdict in enumerate(verdicts):
        stop = start + verdict.stored
        if verdict.shard is not None:
            gone = hidden[start:stop]
            left = verdict.stored - int(gone.sum())
            counts = by_source.setdefault(verdict.shard.source, Counter())
            reasons = choice.count_reasons(start, stop)
            counts.update(shards=int(left > 0), samples=left)
            counts.update({f"left_out.{reason}": count for reason, count in reasons.items()})
            if left:
                path = relative_path(shard_location(verified, verdict.path), out)
                update: dict[str, Any] = {"path": path, "samples": left}
                if left < verdict.stored:
                    packed = np.packbits(gone, bitorder="little").tobytes()
                    update["tombstones_at"] = append_tombstones(packed, bits)
                if (out / shard_captions(number)).exists():
                    update["captions"] = shard_captions(number)
                shards.append(replace(verdict.shard, **update))
        start = stop
    return tuple(shards), {source: dict(by_source[source]) for source in sorted(by_source)}


def _never_packed(ancestors: Sequence[Artifact]) -> Counter[str]:
    """Contents of adopted folders and tables that are not pairs, by reason; no index has them."""
    left_out = Counter[str]()
    for artifact in ancestors:
        for name, number in artifact.counts.items() if artifact.kind == "adopt" else ():
            if name.startswith("left_out."):
                left_out.update({name: int(number), "left_out": int(number)})
    return left_out


def _count_samples(
    rows: int,
    shards: Sequence[Shard],
    choice: choosing.Choice,
    by_source: Mapping[str, Mapping[str, int]],
    held_out: int,
) -> dict[str, int | float]:
    reasons = choice.count_reasons(0, rows)
    samples = sum(shard.samples for shard in shards)
    if samples + held_out + sum(reasons.values()) != rows:
        raise RuntimeError(
            f"{rows} samples were verified, but {samples} and {reasons} do not add up to that"
        )
    return {
        "samples": samples,
        "shards": len(shards),
        "left_out": sum(reasons.values()),
        **({"validation": held_out} if held_out else {}),
        "bytes": sum(shard.bytes for shard in shards),
        **{f"left_out.{reason}": count for reason, count in sorted(reasons.items())},
        **{
            f"{of}.{name}": by_source[of][name]
            for of in by_source
            for name in ("shards", "samples")
        },
    }


def write_card(
    path: Path,
    config: DatasetConfig,
    ancestors: Sequence[Artifact],
    counts: Counts,
    by_source: Mapping[str, Mapping[str, int]],
    captions: Mapping[str, Mapping[str, int]],
    scored: Mapping[str, Sequence[int]],
    takedowns: Sequence[str],
) -> None:
    """Write the card of the version whose artifact is the folder of `path`; `by_source` says what
    became of the samples, `captions` of the rows of every sidecar; `scored` are histograms."""
    made_from: dict[str, list[Artifact]] = {"adopt": [], "merge": [], "download": []}
    for artifact in ancestors:
        made_from.setdefault(artifact.kind, []).append(artifact)
    totals = {
        kind: sum((Counter(one.counts) for one in artifacts), Counter[str]())
        for kind, artifacts in made_from.items()
    }

    def list_sources(kind: str, figures: Sequence[str]) -> Iterator[list[Any]]:
        newest = {one["name"]: one for made in made_from[kind] for one in made.config["sources"]}
        for name, source in newest.items():
            stated = [
                source.get(key) or "not stated in the recipe" for key in ("revision", "licence")
            ]
            found = [totals[kind].get(f"{name}.{figure}", 0) for figure in figures]
            kept = by_source.get(name, {}).get("samples", 0)
            yield [name, f"`{source['files']}`", *stated, *found, kept]

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = lambda cell: (
        f"{cell:,}" if isinstance(cell, int | float) else str(cell)
    )
    card = environment.from_string(Path(__file__).with_name("card.md.j2").read_text()).render(
        digest=path.parent.name,
        config=config,
        counts=counts,
        made_from=made_from,
        totals=totals,
        captions=captions,
        scored=list(scored),
        thresholds=list(_list_thresholds(list(scored.values()))),
        takedowns=len(takedowns),
        ancestors=[[one.kind, f"`{one.digest}`", one.created] for one in ancestors],
        sources=lambda kind, figures: list(list_sources(kind, figures)),
        by_reason=_list_reasons,
        taken_down=TAKEN_DOWN,
        left_out=LEFT_OUT,
    )
    write_atomically(path, card)


def _list_thresholds(histograms: Sequence[Sequence[int]]) -> Iterator[list[Any]]:
    """Of every part that has samples: its least score, and by source their number and the share
    that this least score would keep."""
    counts = np.array(histograms, dtype=np.int64).reshape(-1, SCORE_PARTS)
    kept = counts[:, ::-1].cumsum(axis=1)[:, ::-1] / counts.sum(axis=1, keepdims=True)
    for part in np.flatnonzero(counts.any(axis=0)):
        shares = zip(counts[:, part].tolist(), kept[:, part], strict=True)
        row = [cell for count, share in shares for cell in (count, f"{share:.1%}")]
        yield [f"{2 * part / SCORE_PARTS - 1:.3f}", *row]


def _list_reasons(counts: Counts, prefix: str) -> list[tuple[str, int | float]]:
    return [(name.removeprefix(prefix), n) for name, n in counts.items() if name.startswith(prefix)]
