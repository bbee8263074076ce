"""The samples that are left out, each for one reason, the first that holds; and the evaluation
images (folders of files, webdatasets of any layout) that none of them may be.

Not here: looking into shards (the verify stage), writing what was chosen (dataset.py).

Where samples resemble each other the one that comes first in the index stays. Takedowns come last,
so that none of them brings back a copy that was left out beside the sample that is taken down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import mmh3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import IMAGE_EXTENSIONS
from evaclip_model.reading.tar_file import BrokenTar, TarReader
from tasks.dataset.config import DatasetConfig, OutsideFiles, Seen
from tasks.dataset.lists import SHA256, is_url, read_hashes
from tasks.dataset.scores import Rows, count_scores, find_low_scores, read_uids, uids_of_rows
from tasks.index.perceptual_hash import Hashes, KnownHashes, hash_images, is_crowded, near_pairs
from tasks.index.sample_index import Ints, Kind, Mask, SampleIndex, ShardVerdict

PAIRED_AT_LEAST = 1 << 10
"""Hashes of which all pairs that look alike are held, however many."""
Asked = Mapping[Kind, tuple[str, ...]]
"""What is looked for, by kind."""


def _read_evaluation_images(folders: Sequence[Path]) -> tuple[set[str], Hashes]:
    """SHA-256 of every image file, and of every image in a tar, below the folders (or in single
    tars), and the perceptual hashes of those that can be decoded. InputError: a folder without an
    image, or a tar that cannot be read."""
    digests: set[str] = set()
    looks = np.empty(0, np.uint64)
    for folder in folders:
        hashes = hash_images(iterate_images(folder))
        if not len(hashes):
            raise InputError(
                f"{folder} holds no image: give a folder of image files or of webdataset tars"
            )
        digests.update(hashes.sha256)
        looks = np.union1d(looks, hashes.looks[hashes.decoded])
    return digests, looks


def iterate_images(folder: Path) -> Iterator[bytes]:
    """Content of every image below `folder`, files and members of tars, by name."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        if _is_image(file.name):
            yield file.read_bytes()
        elif file.suffix == ".tar":
            try:
                with file.open("rb", buffering=0) as tar:
                    for member in TarReader(tar.fileno()):
                        if _is_image(member.name):
                            yield member.read(tar.fileno())
            except BrokenTar as error:
                raise InputError(
                    f"{file} cannot be read as a tar ({error}): make the evaluation set again"
                ) from error


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


class LeftOutReason(StrEnum):
    """A reason to leave a sample out; for a flaw it is `bad.` and the flaw's name."""

    SHARD = "shard"
    BLOCKED = "blocked"
    EVALUATION = "evaluation"
    NEAR_EVALUATION = "near_evaluation"
    """Its image feature is near to that of an evaluation image."""
    REPEATED_UID = "repeated_uid"
    EXACT_DUPLICATE = "exact_duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    SEMANTIC_DUPLICATE = "semantic_duplicate"
    NOT_LISTED = "not_listed"
    """In none of the lists that keep."""
    LISTED = "listed"
    """In a list that drops."""
    LOW_SCORE = "low_score"
    TAKEDOWN = "takedown"


class Choice:
    """For every row of an index the reason why it is left out, if it is."""

    def __init__(self, rows: int) -> None:
        self._names: list[str] = [""]
        self._codes = np.zeros(rows, dtype=np.uint8)

    @classmethod
    def from_table(cls, rows: int, table: pa.Table) -> Choice:
        choice = cls(rows)
        for reason in pc.unique(table["reason"]).to_pylist():
            mine = pc.equal(table["reason"], reason)
            choice.leave_out(table["row"].filter(mine).to_numpy(), reason)
        return choice

    def leave_out(self, rows: Rows | npt.NDArray[np.bool_], reason: str) -> None:
        """Leave rows out (numbers, or a mask of all) that no earlier reason did."""
        if reason not in self._names:
            self._names.append(reason)
        places = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        new = places[self._codes[places] == 0]
        self._codes[new] = self._names.index(reason)

    @property
    def left_out(self) -> npt.NDArray[np.bool_]:
        """Mask of the rows that are left out, [rows]."""
        return self._codes.astype(np.bool_)

    def count_reasons(self, start: int, stop: int) -> dict[str, int]:
        """Rows left out among `start` to `stop` (exclusive), by reason."""
        by_code = np.bincount(self._codes[start:stop], minlength=len(self._names))
        return {n: int(c) for n, c in sorted(zip(self._names, by_code, strict=True)) if n and c}

    def to_table(self) -> pa.Table:
        """(row, reason) of all that is left out, by row."""
        rows = np.flatnonzero(self._codes)
        names = pa.DictionaryArray.from_arrays(self._codes[rows], self._names)
        return pa.table({"row": rows, "reason": names.cast(pa.string())})


def choose_samples(
    index: SampleIndex,
    verdicts: Sequence[ShardVerdict],
    config: DatasetConfig,
    outside: OutsideFiles,
) -> Choice:
    """Apply every rule but those of features, scores and takedowns; InputError: a list or
    evaluation set cannot be read."""
    choice = Choice(index.rows)
    tested, tested_looks = _read_evaluation_images(outside.evaluation_sets)
    looks = _go_through(index, verdicts, config, tested_looks, choice)
    for reason, hashes in (
        (LeftOutReason.BLOCKED, read_hashes(outside.blocklists)),
        (LeftOutReason.EVALUATION, sorted(tested)),
    ):
        choice.leave_out(_rows_of(index.find_samples(Kind.HASH, hashes)), reason)
    if outside.keep_uids:
        listed = index.find_listed(read_uids(outside.keep_uids))
        choice.leave_out(~listed, LeftOutReason.NOT_LISTED)
    if outside.drop_uids:
        listed = index.find_listed(read_uids(outside.drop_uids))
        choice.leave_out(listed, LeftOutReason.LISTED)
    repeated = [(Kind.UID, LeftOutReason.REPEATED_UID)]
    if config.exact_duplicates == "drop":  # the same image, as downloaded or as stored
        repeated.append((Kind.HASH, LeftOutReason.EXACT_DUPLICATE))
    for kind, reason in repeated:
        taken = np.zeros(index.rows, dtype=np.bool_)
        for rows, groups, first in index.find_repeated(kind, ~choice.left_out):
            choice.leave_out(_find_later(rows, groups, first, taken), reason)
    if config.near_duplicates == "drop":
        alike = _later_looks(looks, config.max_distance, np.flatnonzero(~choice.left_out))
        choice.leave_out(alike, LeftOutReason.NEAR_DUPLICATE)
    return choice


def leave_out_low_scores(
    choice: Choice,
    index: SampleIndex,
    verdicts: Sequence[ShardVerdict],
    config: DatasetConfig,
    seen: Seen,
) -> dict[str, list[int]]:
    """Apply the rules of scores to what all others leave; of that, by source, how many samples have
    a score in each of the equal parts of -1 to 1."""
    of_shards = [verdict.shard.source if verdict.shard else "" for verdict in verdicts]
    names, numbers = np.unique(of_shards, return_inverse=True)
    sources = np.repeat(numbers, [verdict.stored for verdict in verdicts])
    stays = ~choice.left_out & ~np.isnan(seen.scores)
    low = find_low_scores(
        *(seen.scores, stays, sources + len(names) * seen.parts),
        min_score=config.min_score,
        keep_share=config.keep_share,
        uids_of=partial(uids_of_rows, index),
    )
    choice.leave_out(low, LeftOutReason.LOW_SCORE)
    counts = count_scores(seen.scores[stays], sources[stays], len(names))
    return {str(name): row.tolist() for name, row in zip(names, counts, strict=True) if row.any()}


def find_held_out(index: SampleIndex, share: float) -> npt.NDArray[np.bool_]:
    """Mask [rows] of the samples kept for validation, the same whatever else is in the data."""
    if not share:
        return np.zeros(index.rows, dtype=np.bool_)
    most = share * 2**32
    chunks = (table["uid"].to_pylist() for table in index.iterate_chunks("uid"))
    numbers = (mmh3.hash(uid or "", signed=False) < most for chunk in chunks for uid in chunk)
    return np.fromiter(numbers, np.bool_, index.rows)


def find_asked(index: SampleIndex, asked: Asked) -> Rows:
    """Rows of the samples that are asked for, and of those with the same image, ascending."""
    found = [
        row for kind, values in asked.items() if values for row in index.find_samples(kind, values)
    ]
    names = ("sha256", "stored_sha256")
    images = {row[name] for row in found for name in names if row[name] is not None}
    return np.unique(_rows_of([*found, *index.find_samples(Kind.HASH, sorted(images))]))


def sort_by_kind(entries: Iterable[str]) -> Asked:
    """Takedown entries by their kind; a hash of 64 digits may be a uid as well."""
    urls = tuple(entry for entry in entries if is_url(entry))
    others = tuple(entry for entry in entries if not is_url(entry))
    hashes = tuple(entry for entry in others if SHA256.fullmatch(entry))
    return {Kind.URL: urls, Kind.UID: others, Kind.HASH: hashes}


def _go_through(
    index: SampleIndex,
    verdicts: Sequence[ShardVerdict],
    config: DatasetConfig,
    tested: Hashes,
    choice: Choice,
) -> Hashes:
    """One pass over the rows: shards, flaws, evaluation images by their looks. Returns perceptual
    hashes [rows], 0 where there is none, if near duplicates are looked for."""
    unusable = np.array([verdict.shard is None for verdict in verdicts])
    near = config.near_duplicates == "drop"
    looks = np.zeros(index.rows if near else 0, dtype=np.uint64)
    known = KnownHashes(tested, config.max_distance) if len(tested) else None
    start = 0
    for table in index.iterate_chunks("shard", "flaw", "phash"):
        rows = np.arange(start, start + table.num_rows)
        choice.leave_out(rows[unusable[table["shard"].to_numpy()]], LeftOutReason.SHARD)
        for flaw in pc.unique(table["flaw"].drop_null()).to_pylist():
            bad = pc.fill_null(pc.equal(table["flaw"], flaw), False).to_numpy()
            choice.leave_out(rows[bad], f"bad.{flaw}")
        hashes = pc.fill_null(table["phash"], 0).to_numpy()
        if known is not None:
            alike = known.find_near(hashes) & table["phash"].is_valid().to_numpy()
            choice.leave_out(rows[alike], LeftOutReason.EVALUATION)
        if near:
            looks[rows] = hashes
        start += table.num_rows
    return looks


def _find_later(rows: Ints, groups: Ints, first: Ints, taken: Mask) -> Rows:
    """Rows, some twice, that share a group with an earlier row that stays; `rows` ascend, each as
    often as it has groups, whose `first` row is told beside them. A row that goes takes no group,
    so a chain a-b-c of which b goes leaves c in. `taken` [groups] is what rows before these took,
    and learns what these take. Each round settles all rows that nothing unsettled stands before."""
    later = [np.empty(0, dtype=np.int64)]
    while len(rows):
        waits = np.isin(rows, rows[first != rows])
        taken[groups[~waits]] = True
        goes = np.isin(rows, rows[waits & taken[groups]])
        later.append(rows[goes])
        rows, groups = rows[waits & ~goes], groups[waits & ~goes]
        _, places, numbers = np.unique(groups, return_index=True, return_inverse=True)
        first = rows[places][numbers]
    return np.concatenate(later)


def _later_looks(looks: Hashes, most: int, candidates: Rows) -> Rows:
    """Rows of `candidates` (ascending) that look like an earlier one that stays. Only distinct
    hashes are paired, because equal ones would all be paired with each other."""
    asked = looks[candidates]
    _, first = np.unique(asked, return_index=True)
    goes = np.ones(len(candidates), dtype=np.bool_)  # behind one that looks the same
    first.sort()
    goes[first] = _find_later_looks(asked[first], most)
    return candidates[goes]


def _find_later_looks(hashes: Hashes, most: int) -> npt.NDArray[np.bool_]:
    """Mask of the hashes, which differ, that are near an earlier one that stays. A crowd of n that
    look alike makes n^2 pairs: then the first half's that stay take those of the second away."""
    goes = np.zeros(len(hashes), dtype=np.bool_)
    if len(hashes) <= PAIRED_AT_LEAST or not is_crowded(hashes, most):
        pairs = near_pairs(hashes, most)
        order = np.argsort(pairs, axis=None)
        numbers, taken = order // 2, np.zeros(len(pairs), dtype=np.bool_)
        goes[_find_later(pairs.ravel()[order], numbers, pairs[numbers, 0], taken)] = True
        return goes
    half = len(hashes) // 2
    goes[:half] = _find_later_looks(hashes[:half], most)
    goes[half:] = KnownHashes(hashes[:half][~goes[:half]], most).find_near(hashes[half:])
    rest = half + np.flatnonzero(~goes[half:])
    goes[rest] = _find_later_looks(hashes[rest], most)
    return goes


def _rows_of(found: Iterable[Mapping[str, Any]]) -> Rows:
    return np.array([row["row"] for row in found], dtype=np.int64)
