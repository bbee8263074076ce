"""Adopt sources: list shards where they lie, pack what lies in folders and tables.

Covers: the list of shards, packing by webdataset's writer, what was left out and why.
Not here: finding files (find_source.py), reading pairs (read_pairs.py), looking into shards, which
is verification's.

Shards are never copied or rewritten. What is packed keeps its bytes; the same source gives the same
tars, byte by byte, so that a killed run's leavings need no trust: they are packed again.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from evaclip_model.errors import InputError
from evaclip_model.files import replace_file, write_atomically
from evaclip_model.reading.samples import BrokenShard, read_samples
from evaclip_model.reading.urls import is_url
from tasks.adopt.config import AdoptConfig, AdoptedSource, Form
from tasks.adopt.find_source import (
    FoundSource,
    find_source,
    is_image_type,
    mark_files,
    without_known,
)
from tasks.adopt.read_pairs import IMAGE_COLUMNS, URL_COLUMNS, FoundPair, NoPair, read_pairs
from tasks.artifacts.artifact import Made
from tasks.index.adopted_shards import (
    ADOPTED,
    AdoptedShard,
    on_this_machine,
    sizes_and_marks,
    write_adopted,
)
from tasks.progress import Report
from tasks.tables.parquet_tables import parquet_schema
from tasks.tables.text_tables import column_names, text_format

LEFT_OUT = "left_out.jsonl"
"""Source, place and reason of what is not a pair: the first `MOST_NAMED` of every source."""
MOST_NAMED = 10_000
INPUTS = "inputs.json"
"""Source -> marks of the files that were taken."""
PACKED = "packed"
"""Folder of the shards that are packed here, one folder a source."""
MOST_PAIRS = 20_000
"""Rows or images of a table or a folder that are looked at."""


@dataclass
class LeftOut:
    """Rows and files of a source that are not pairs."""

    reasons: Counter[str] = field(default_factory=Counter)
    named: list[NoPair] = field(default_factory=list)

    def add_reason(self, one: NoPair) -> None:
        """Count it, and keep the first ones."""
        self.reasons[str(one.reason)] += 1
        if len(self.named) < MOST_NAMED:
            self.named.append(one)

    @property
    def first(self) -> str:
        """Place and reason of the first."""
        if not self.named:
            return ""
        where = os.fsencode(self.named[0].where).decode(errors="replace")  # as it can be shown
        return f"{where}: {self.named[0].reason}"

    def __str__(self) -> str:
        """Counts by reason, and the first of them, as the end of a sentence."""
        said = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
        return f" ({said}; the first is {self.first})" if said else ""


def read_inputs(folder: Path) -> dict[str, set[str]]:
    """Source -> marks of the files that a finished adoption took; none for one of before there was
    such a list."""
    path = folder / INPUTS
    known = json.loads(path.read_text()) if path.exists() else {}
    return {name: set(marks) for name, marks in known.items()}


def adopt_sources(
    config: AdoptConfig, out: Path, report: Report, given: Sequence[Path] = ()
) -> Made:
    """Write the list of all shards into `out`, and pack there what has no shards.

    Args:
        given: folders of earlier adoptions, whose files are not taken again.

    Raises:
        InputError: a source cannot be found or read, or holds no pair.
    """
    found = [find_source(source) for source in config.sources]
    for earlier in map(read_inputs, given):
        found = [without_known(one, earlier.get(one.source.name, set())) for one in found]
    shutil.rmtree(out / PACKED, ignore_errors=True)
    shards: list[AdoptedShard] = []
    lines: list[str] = []
    counts: Counter[str] = Counter()
    for number, one in enumerate(found):
        name = one.source.name
        report(number, len(found), f"{name}: {one.form}")
        if one.form == "shards":
            own = _describe(one, [(file, one.name_of(file)) for file in one.files])
        else:
            left = LeftOut()
            packed = [str(tar) for tar in _pack_pairs(one, out, config.samples_per_shard, left)]
            own = _describe(one, [(tar, Path(tar).name) for tar in packed], out)
            counts[f"{name}.left_out"] = left.reasons.total()
            counts.update({f"left_out.{reason}": n for reason, n in left.reasons.items()})
            lines += [
                json.dumps({"source": name, "where": gap.where, "reason": str(gap.reason)}) + "\n"
                for gap in left.named
            ]
            counts["packed"] += len(own)
        counts["shards"] += len(own)
        counts["bytes"] += sum(shard.size for shard in own)
        counts[f"{name}.shards"] = len(own)
        shards += own
    write_adopted(shards, out)
    write_atomically(out / LEFT_OUT, "".join(lines))
    marks = {one.source.name: sorted(mark_files(one).values()) for one in found}
    write_atomically(out / INPUTS, json.dumps(marks))
    report(len(found), len(found), f"{counts['shards']:,} shards")
    made = tuple(sorted((out / PACKED).rglob("*.tar")))
    return Made(dict(counts), (out / ADOPTED, out / LEFT_OUT, out / INPUTS), made)


def _describe(
    found: FoundSource, shards: Sequence[tuple[str, str]], folder: Path | None = None
) -> list[AdoptedShard]:
    """(location, name) of shards -> what the list says of them; those packed here lie below
    `folder`.

    Raises:
        InputError: one cannot be read.
    """
    described = []
    known = sizes_and_marks([location for location, _ in shards])
    for (location, name), size_and_mark in zip(shards, known, strict=True):
        if size_and_mark is None:
            raise InputError(f"{location} cannot be read")
        described.append(
            AdoptedShard(
                location=location if folder is None else os.path.relpath(location, folder),
                name=name,
                source=found.source.name,
                size=size_and_mark[0],
                mark=size_and_mark[1],
            )
        )
    return described


def _pack_pairs(found: FoundSource, out: Path, per_shard: int, left: LeftOut) -> Iterator[Path]:
    """Pack a source's pairs; of what is none, `left` keeps the count.

    Raises:
        InputError: there is no pair.
    """
    pairs = _only_pairs(read_pairs(found), left)
    folder = out / PACKED / found.source.name
    folder.mkdir(parents=True)
    number = 0
    while batch := list(islice(pairs, per_shard)):
        tar = folder / f"{number:06d}.tar"
        _write_tar(tar, batch, found.source.name, number * per_shard)
        yield tar
        number += 1
    if not number:
        raise InputError(
            f"adopt.sources '{found.source.name}': {found.source.files} holds no image with a "
            f"caption{left}"
        )


def _only_pairs(found: Iterable[FoundPair | NoPair], left: LeftOut) -> Iterator[FoundPair]:
    for one in found:
        if isinstance(one, NoPair):
            left.add_reason(one)
        else:
            yield one


def _write_tar(tar: Path, pairs: Sequence[FoundPair], source: str, first: int) -> None:
    import webdataset  # it imports torch, which a source of shards needs not

    with (
        replace_file(tar) as beside,
        beside.open("wb") as stream,
        webdataset.TarWriter(stream, user="", group="", mtime=0, encoder=False) as writer,
    ):
        for number, pair in enumerate(pairs, first):
            record = {"uid": pair.uid, "source": source, "original_id": pair.origin}
            if pair.url:
                record["url"] = pair.url
            writer.write(
                {
                    "__key__": f"{number:09d}",
                    pair.extension: pair.image,
                    "txt": pair.caption.encode("utf-8", "replace"),
                    "json": json.dumps(record).encode(),
                }
            )


@dataclass
class SourceInspection:
    """The content of the files of one pattern."""

    form: Form
    files: int
    """Of the form."""
    read_files: int
    """How many of them were looked at: all but for many shards."""
    samples: int = 0
    """Images with captions in those."""
    left: LeftOut = field(default_factory=LeftOut)
    """What is none."""
    is_cut_short: bool = False
    """Whether there is more than was looked at."""


def inspect_source(pattern: str, read_files: int = 4) -> SourceInspection | None:
    """Look at what a source's `files` would take; None for metadata, which names images by URL.

    Raises:
        InputError: nothing matches, or it is of no form.
    """
    found = find_source(
        AdoptedSource.from_mapping({"name": "inspected", "files": pattern}, "inspect")
    )
    if _is_metadata(found):
        return None
    if found.form == "shards":
        return _inspect_shards(found, read_files)
    inspection = SourceInspection(found.form, len(found.files), len(found.files))
    pairs = read_pairs(found)
    inspection.samples = sum(1 for _ in _only_pairs(islice(pairs, MOST_PAIRS), inspection.left))
    inspection.is_cut_short = next(pairs, None) is not None
    return inspection


def _is_metadata(found: FoundSource) -> bool:
    """Return whether the first file has a column of addresses and none of images."""
    if found.form not in ("table", "parquet"):
        return False
    first = found.files[0]
    kind = text_format(first)
    if kind is not None:
        names = column_names(first, kind, "auto", True)
    else:
        schema = parquet_schema(first, "sources inspect")
        names = schema.names
        if any(is_image_type(schema.field(name).type) for name in names):
            return False
    return not set(names) & set(IMAGE_COLUMNS) and bool(set(names) & set(URL_COLUMNS))


def _inspect_shards(found: FoundSource, read_files: int) -> SourceInspection:
    # one that must be fetched is enough
    shards = [file for file in found.files[:read_files] if not is_url(file)] or found.files[:1]
    inspection = SourceInspection("shards", len(found.files), len(shards))
    inspection.is_cut_short = len(shards) < len(found.files)
    with TemporaryDirectory() as folder:
        for shard in shards:
            try:
                with on_this_machine(shard, Path(folder)) as tar:
                    for sample in read_samples(tar):
                        if sample.flaw is None:
                            inspection.samples += 1
                        else:
                            where = f"{shard}, sample {sample.key}"
                            inspection.left.add_reason(NoPair(where, sample.flaw))
            except BrokenShard as error:
                inspection.left.add_reason(NoPair(shard, f"not a whole tar ({error})"))
    return inspection
