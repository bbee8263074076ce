"""Adopt sources: list shards where they lie, pack what lies in folders and tables by webdataset's
writer, count what is left out. Not here: finding files (find_source.py), reading pairs
(read_pairs.py), looking into shards, which is verification's.

Shards are never copied or rewritten. What is packed keeps its bytes; the same source gives the same
tars, byte by byte, so that a killed run's leavings need no trust: they are packed again.
"""

import json
import os
import posixpath
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from evaclip_model.errors import InputError
from evaclip_model.files import replace_file, write_atomically
from evaclip_model.reading.samples import BrokenShard, read_samples
from evaclip_model.reading.table_columns import match_column
from evaclip_model.reading.urls import is_url
from tasks.adopt import read_pairs as reading
from tasks.adopt.config import AdoptConfig, AdoptedSource, Form
from tasks.adopt.find_source import FoundSource, find_source, mark_files, without_known
from tasks.artifacts.artifact import INPUTS, Made, read_inputs
from tasks.index import adopted_shards
from tasks.progress import Report

LEFT_OUT = "left_out.jsonl"
"""Source, place and reason of what is not a pair: the first `MOST_NAMED` of every source."""
MOST_NAMED = 10_000
OUTSIDE_HINT = "; name the folder that may be read in 'within'"
PACKED = "packed"
"""Folder of the shards that are packed here, one folder a source."""
MOST_PAIRS = 20_000
"""Rows or images of a table or a folder that are looked at."""


@dataclass
class LeftOut:
    """Rows and files of a source that are not pairs, and the number of those that are."""

    reasons: Counter[str] = field(default_factory=Counter)
    named: list[reading.NoPair] = field(default_factory=list)
    pairs: int = 0

    def take_pairs(
        self, found: Iterable[reading.FoundPair | reading.NoPair]
    ) -> Iterator[reading.FoundPair]:
        """Yield the pairs; count what is none, and keep the first ones."""
        for one in found:
            if isinstance(one, reading.FoundPair):
                self.pairs += 1
                yield one
            else:
                self.reasons[str(one.reason)] += 1
                if len(self.named) < MOST_NAMED:
                    self.named.append(one)

    @property
    def first(self) -> str:
        """Place and reason of the first, and what to do."""
        if not self.named:
            return ""
        where = os.fsencode(self.named[0].where).decode(errors="replace")  # as it can be shown
        hint = OUTSIDE_HINT * (reading.PairFlaw.OUTSIDE_FOLDER in self.reasons)
        return f"{where}: {self.named[0].reason}{hint}"

    def __str__(self) -> str:
        """Counts by reason, and the first of them, as the end of a sentence."""
        said = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
        return f" ({said}; the first is {self.first})" if said else ""


def adopt_sources(
    config: AdoptConfig, out: Path, report: Report, given: Sequence[Path] = ()
) -> Made:
    """Write the list of all shards into `out`, and pack there what has no shards; of the files of
    earlier adoptions, in the folders `given`, none is taken again."""
    found = [find_source(source) for source in config.sources]
    for earlier in map(read_inputs, given):
        found = [without_known(one, earlier.get(one.source.name, set())) for one in found]
    shutil.rmtree(out / PACKED, ignore_errors=True)
    shards: list[adopted_shards.AdoptedShard] = []
    lines: list[str] = []
    counts: Counter[str] = Counter()
    for number, one in enumerate(found):
        name = one.source.name
        report(number, len(found), f"{name}: {one.form}")
        if one.form == "shards":
            own = _describe(one, one.files)
        else:
            left = LeftOut()
            own = _describe(one, _pack_pairs(one, out, config.samples_per_shard, left), out)
            counts[f"{name}.samples"] = left.pairs
            counts[f"{name}.left_out"] = left.reasons.total()
            counts.update({f"left_out.{reason}": n for reason, n in left.reasons.items()})
            for gap in left.named:
                said = {"source": name, "where": gap.where, "reason": str(gap.reason)}
                lines.append(json.dumps(said) + "\n")
            counts["packed"] += len(own)
        size = sum(shard.size for shard in own)
        counts.update({"shards": len(own), "bytes": size, f"{name}.shards": len(own)})
        shards += own
    adopted_shards.write_adopted(shards, out)
    write_atomically(out / LEFT_OUT, "".join(lines))
    marks = {one.source.name: sorted(mark_files(one).values()) for one in found}
    write_atomically(out / INPUTS, json.dumps(marks))
    report(len(found), len(found), f"{counts['shards']:,} shards")
    made = tuple(sorted((out / PACKED).rglob("*.tar")))
    return Made(dict(counts), (out / adopted_shards.ADOPTED, out / LEFT_OUT, out / INPUTS), made)


def _describe(
    found: FoundSource, shards: Sequence[str], out: Path | None = None
) -> list[adopted_shards.AdoptedShard]:
    """Return what the list says of shards, which were packed below `out` or lie elsewhere."""
    described = []
    for shard, seen in zip(shards, adopted_shards.sizes_and_marks(shards), strict=True):
        if seen is None:
            raise InputError(f"{shard} cannot be read")
        location = shard if out is None else os.path.relpath(shard, out)
        name = found.name_of(shard) if out is None else posixpath.basename(shard)
        size, mark = seen
        source = found.source.name
        described.append(
            adopted_shards.AdoptedShard(
                location=location, name=name, source=source, size=size, mark=mark
            )
        )
    return described


def _pack_pairs(found: FoundSource, out: Path, per_shard: int, left: LeftOut) -> list[str]:
    """Pack a source's pairs; `left` keeps the counts. Refuse a source without any."""
    source, tars = found.source, list[Path]()
    pairs = left.take_pairs(reading.read_pairs(found))
    folder = out / PACKED / source.name
    folder.mkdir(parents=True)
    while batch := list(islice(pairs, per_shard)):
        tars.append(folder / f"{len(tars):06d}.tar")
        _write_tar(tars[-1], batch, (len(tars) - 1) * per_shard)
    if not tars:
        where = f"adopt.sources '{source.name}'"
        raise InputError(f"{where}: {source.files} holds no image with a caption{left}")
    return list(map(str, tars))


def _write_tar(tar: Path, pairs: Sequence[reading.FoundPair], first: int) -> None:
    import webdataset  # it imports torch, which a source of shards needs not

    with (
        replace_file(tar) as beside,
        beside.open("wb") as stream,
        webdataset.TarWriter(stream, user="", group="", mtime=0, encoder=False) as writer,
    ):
        for number, pair in enumerate(pairs, first):
            record = json.dumps(pair.record).encode()
            caption = pair.caption.encode("utf-8", "replace")
            key = f"{number:09d}"
            writer.write(
                {"__key__": key, pair.extension: pair.image, "txt": caption, "json": record}
            )


@dataclass
class SourceInspection:
    form: Form
    files: int
    read_files: int
    """How many of them were looked at: all but for many shards."""
    left: LeftOut = field(default_factory=LeftOut)
    is_cut_short: bool = False
    """Whether there is more than was looked at."""


def inspect_source(pattern: str, read_files: int = 4) -> SourceInspection | None:
    """Look at what a source's `files` would take; None for metadata, which names images by URL."""
    source = AdoptedSource.from_mapping({"name": "inspected", "files": pattern}, "inspect")
    found = find_source(source)
    if _is_metadata(found):
        return None
    if found.form == "shards":
        return _inspect_shards(found, read_files)
    inspection = SourceInspection(found.form, len(found.files), len(found.files))
    pairs = reading.read_pairs(found)
    deque(inspection.left.take_pairs(islice(pairs, MOST_PAIRS)), maxlen=0)
    inspection.is_cut_short = next(pairs, None) is not None
    return inspection


def _is_metadata(found: FoundSource) -> bool:
    """Return whether the first file has a column of addresses and none of images."""
    if found.form not in ("table", "parquet"):
        return False
    names, typed = reading.column_types(found.source, found.files[0])
    return bool(match_column(names, "urls") and not (typed or match_column(names, "images")))


def _inspect_shards(found: FoundSource, read_files: int) -> SourceInspection:
    # one that must be fetched is enough
    shards = [file for file in found.files[:read_files] if not is_url(file)] or found.files[:1]
    left, named = LeftOut(), list[reading.NoPair]()
    with TemporaryDirectory() as folder:
        for shard in shards:
            try:
                with adopted_shards.on_this_machine(shard, Path(folder)) as tar:
                    for sample in read_samples(tar):
                        if sample.flaw is None:
                            left.pairs += 1
                        else:
                            named.append(
                                reading.NoPair(f"{shard}, sample {sample.key}", sample.flaw)
                            )
            except BrokenShard as error:
                named.append(reading.NoPair(shard, f"not a whole tar ({error})"))
    deque(left.take_pairs(named), maxlen=0)
    is_cut_short = len(shards) < len(found.files)
    return SourceInspection("shards", len(found.files), len(shards), left, is_cut_short)
