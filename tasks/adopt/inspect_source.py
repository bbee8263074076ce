"""A look into files before they become an adopted source: form, samples, what is left out.

Covers: a look at the first files of each form. Not here: printing; decoding images, which only
verification does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import BrokenShard, read_samples
from evaclip_model.reading.urls import is_url
from tasks.adopt.config import AdoptedSource, Form
from tasks.adopt.find_source import FoundSource, find_source, is_image_type, parquet_schema
from tasks.adopt.read_pairs import IMAGE_COLUMNS, URL_COLUMNS, NoPair, read_pairs
from tasks.tables.text_tables import column_names, text_format

MOST_PAIRS = 20_000
"""Rows or images of a table or a folder that are looked at."""


@dataclass
class SourceInspection:
    """What the files of one pattern hold."""

    form: Form
    files: int
    """Of the form."""
    read_files: int
    """How many of them were looked at: all but for many shards."""
    samples: int = 0
    """Images with captions in those."""
    left_out: Counter[str] = field(default_factory=Counter)
    """What is none, by reason."""
    first_left_out: str = ""
    """Place and reason of the first."""
    is_cut_short: bool = False
    """Whether there is more than was looked at."""

    def leave_out(self, where: str, reason: str) -> None:
        """Count one that is not a pair."""
        self.left_out[reason] += 1
        self.first_left_out = self.first_left_out or f"{where}: {reason}"


def inspect_source(pattern: str, read_files: int = 4) -> SourceInspection | None:
    """Look at what a source's `files` would take; None for metadata, which names images by URL.

    Raises:
        InputError: nothing matches, or it is of no form.
    """
    found = find_source(AdoptedSource(name="inspected", files=pattern))
    if _is_metadata(found):
        return None
    if found.form == "shards":
        return _inspect_shards(found, read_files)
    inspection = SourceInspection(found.form, len(found.files), len(found.files))
    pairs = read_pairs(found)
    for one in islice(pairs, MOST_PAIRS):
        if isinstance(one, NoPair):
            inspection.leave_out(one.where, one.reason)
        else:
            inspection.samples += 1
    inspection.is_cut_short = next(pairs, None) is not None
    return inspection


def _is_metadata(found: FoundSource) -> bool:
    """Whether the first file has a column of addresses and none of images."""
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
    shards = [file for file in found.files if not is_url(file)][:read_files]
    if not shards:
        raise InputError(
            f"{found.files[0]}: shards at a URL are looked into when they are verified; copy one "
            "here to inspect it"
        )
    inspection = SourceInspection("shards", len(found.files), len(shards))
    inspection.is_cut_short = len(shards) < len(found.files)
    for shard in shards:
        try:
            for sample in read_samples(Path(shard)):
                if sample.flaw is None:
                    inspection.samples += 1
                else:
                    inspection.leave_out(f"{shard}, sample {sample.key}", sample.flaw)
        except BrokenShard as error:
            inspection.leave_out(shard, f"not a whole tar ({error})")
    return inspection
