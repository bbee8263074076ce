"""Rules of image features: samples near to evaluation images, and semantic duplicates, found among
what other rules leave, in units of work that a killed run keeps; any number of threads, any limit
of memory and any machine find the same.

A semantic duplicate lies within the angle of a sample of better rank, which counts whether it goes
itself or not, as in SemDeDup: what becomes of a sample depends on no order of work and on no other
cell's outcome. No two within the angle stay, and of a chain the best does.

A feature's numbers are float16, multiples of 2^-24, and its length is 1 but for their rounding. A
product of two is a multiple of 2^-48, and no sum of some of them reaches 2: float64 holds each one
without rounding, in whatever order a library adds. `are_within` therefore compares an exact dot
product with a bound of one square root and two products, which IEEE 754 rounds in one way. Float32
decides first wherever its largest error cannot change the answer.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import normalize

from evaclip_model.errors import InputError
from evaclip_model.files import replace_file
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.zeroshot.encode_chunks import embed_images
from tasks.dataset.choose import Choice, LeftOutReason, iterate_images
from tasks.dataset.config import SEARCH, DatasetConfig, Seen
from tasks.encoders.open_models import open_subject
from tasks.index.sample_index import Ints
from tasks.progress import Report

GROUP = 1 << 16
"""Features that are put into cells at once."""
MOST_CELLS, BLOCKS, SHARDS_READ = 8192, 256, 256
COPIES = 8
"""Of a record that a thread may hold at once, with what it is compared with."""
PICTURE = -1
"""Rank of an evaluation image."""
Array = npt.NDArray[Any]
Records = npt.NDArray[np.void]
"""(rank, whether the cell is its home, feature) by cell."""
TILE, WIDTH = 1024, 2048
"""Features that are compared at once: 8 MB of dot products."""


def leave_out_near(
    choice: Choice,
    config: DatasetConfig,
    seen: Seen,
    evaluation_sets: Sequence[Path],
    out: Path,
    report: Report,
) -> None:
    """Apply the rules of features to what is left. InputError: the model cannot be opened, or no
    evaluation image be decoded."""
    for degrees, reason in (
        (config.near_evaluation, LeftOutReason.NEAR_EVALUATION),
        (config.semantic_duplicates, LeftOutReason.SEMANTIC_DUPLICATE),
    ):
        rows = np.flatnonzero(~choice.left_out & ~np.isnan(seen.scores))
        if degrees is None or not len(rows):
            continue
        by_rank = rows[np.argsort(-seen.scores[rows], kind="stable")]
        ranks = np.full(len(seen.scores), -1)
        ranks[by_rank] = np.arange(len(rows))
        scratch, pictures = out / SEARCH / reason, None
        if reason is LeftOutReason.NEAR_EVALUATION:
            make = partial(_embed_pictures, seen, evaluation_sets)
            (pictures,) = _finish(scratch / "pictures", 1, make, 1, report)
        found = find_near(seen, ranks, pictures, degrees, config.memory_bytes, scratch, report)
        choice.leave_out(by_rank[found], reason)


def find_near(
    seen: Seen,
    ranks: Ints,
    pictures: Path | None,
    degrees: float,
    memory: int,
    scratch: Path,
    report: Report,
) -> Ints:
    """Ranks, ascending, of the samples within the angle of a better one; or, where there is a file
    of `pictures` (float16 [P, D]), of one of them. `ranks` [rows] begin at 0, the best, and are -1
    where a row takes no part; `memory` is that of all threads, in bytes, but for what one needs at
    least; `scratch` holds finished units."""
    stops = [*(start for _, start in seen.files[1:]), len(ranks)]
    pairs = zip(seen.files, stops, strict=True)
    shards = [(file, ranks[at:stop]) for (file, at), stop in pairs if (ranks[at:stop] >= 0).any()]
    held = np.cumsum([int((mine >= 0).sum()) for _, mine in shards])
    edges = [0, *(np.flatnonzero(np.diff(held // GROUP)) + 1).tolist(), len(shards)]
    width = pq.read_schema(shards[0][0]).field("image").type.list_size
    record = np.dtype([("rank", "<i8"), ("home", "?"), ("feature", "<f2", (width,))])
    fit = memory // (COPIES * record.itemsize)
    threads = max(1, min(len(os.sched_getaffinity(0)), fit // GROUP))
    finish = partial(_finish, threads=threads, report=report)
    centres = _draw_centres(shards, min(2 * math.isqrt(int(held[-1])), MOST_CELLS), degrees).to(
        seen.device
    )
    bounds, cells = bound_guests(centres, degrees), len(centres)

    def sort(group: int) -> Iterator[Array]:
        """The place where each cell begins, and then the records."""
        if group < len(edges) - 1:
            parts = [_read_shard(*one) for one in shards[edges[group] : edges[group + 1]]]
        else:
            features = np.fromfile(str(pictures), np.float16).reshape(-1, width)
            parts = [(np.full(len(features), PICTURE), features)]
        mine, features = (np.concatenate(each) for each in zip(*parts, strict=True))
        stays = find_cells(torch.from_numpy(features).to(seen.device), centres, bounds)
        rows, places, homes = (each.cpu().numpy() for each in stays)
        order = np.argsort(places, kind="stable")
        yield np.searchsorted(places[order], np.arange(cells + 1))
        for some in np.split(order, range(GROUP, len(order), GROUP)):
            records = np.empty(len(some), record)
            records["rank"], records["home"] = mine[rows[some]], homes[some]
            records["feature"] = features[rows[some]]
            yield records

    files = finish(scratch / "cells", len(edges) - (pictures is None), sort)
    starts = np.stack([np.fromfile(one, np.int64, cells + 1) for one in files])

    def search(block: int) -> Iterator[Array]:
        for cell in np.array_split(np.arange(cells), min(cells, BLOCKS))[block]:
            counts = starts[:, cell + 1] - starts[:, cell]
            begin = starts[0].nbytes + starts[:, cell] * record.itemsize
            part_of = np.cumsum(counts) // max(1, fit // threads)
            slices = list(zip(files, counts.tolist(), begin.tolist(), strict=True))
            parts = [
                partial(_read_records, [slices[n] for n in np.flatnonzero(part_of == part)], record)
                for part in np.unique(part_of)
            ]
            yield from _search_cell(parts, cosine_of(degrees), pictures is not None, seen.device)

    found = finish(scratch / "found", min(cells, BLOCKS), search)
    return np.unique(np.concatenate([np.fromfile(one, np.int64) for one in found]))


def _finish(
    folder: Path, count: int, make: Callable[[int], Iterable[Array]], threads: int, report: Report
) -> list[Path]:
    """Files of so many units of work, each its arrays behind each other; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:06d}" for number in range(count)]
    missing = [number for number, file in enumerate(files) if not file.exists()]

    def write(number: int) -> None:
        with replace_file(files[number]) as beside, beside.open("wb") as file:
            for array in make(number):
                array.tofile(file)

    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, "search", torch.set_num_threads, (1,)) as pool:
        for done, _ in enumerate(pool.map(write, missing), start=count - len(missing) + 1):
            report(done, count, f"{folder.parent.name}: {folder.name}")
    torch.set_num_threads(before)
    return files


def _embed_pictures(seen: Seen, folders: Sequence[Path], _: int) -> Iterator[Array]:
    subject = open_subject(seen.find_model(), device=seen.device, precision=seen.precision)

    def decode_all() -> Iterator[Tensor]:
        for image in (image for folder in folders for image in iterate_images(folder)):
            with suppress(UnreadableImageError):
                yield subject.transform(decode_image(image))

    pixels = decode_all()
    if (first := next(pixels, None)) is None:
        raise InputError("dataset.near_evaluation: no image of the evaluation sets can be decoded")
    yield embed_images(subject, chain([first], pixels)).numpy().astype(np.float16)


def _draw_centres(shards: Sequence[tuple[Path, Ints]], most: int, degrees: float) -> Tensor:
    """Features of the cells' centres, drawn evenly; copies would make guests of all the others."""
    numbers = np.linspace(0, len(shards) - 1, min(len(shards), SHARDS_READ)).astype(int)
    parts = []
    for number in numbers:
        _, one = _read_shard(*shards[number])
        parts.append(one[np.arange(0, len(one), -(-len(one) * len(numbers) // most))])
    drawn = np.concatenate(parts)[:most]
    order, features = torch.arange(len(drawn)), torch.from_numpy(drawn)
    near = find_outranked(order, features, order, features, cosine_of(min(2 * degrees, 90)))
    return features[~near]


def _read_shard(file: Path, ranks: Ints) -> tuple[Ints, Array]:
    """(ranks [N], image features [N, D]) of a shard's samples that take part."""
    table = pq.read_table(file, columns=["place", "image"])
    mine = ranks[table["place"].to_numpy()]
    column = table["image"].combine_chunks()
    return mine[mine >= 0], column.flatten().to_numpy().reshape(len(column), -1)[mine >= 0]


def _read_records(slices: Sequence[tuple[Path, int, int]], record: np.dtype[np.void]) -> Records:
    """Records of (file, count, first byte), by rank."""
    read = [np.fromfile(file, record, count, offset=at) for file, count, at in slices]
    records = np.concatenate(read)
    return records[np.argsort(records["rank"], kind="stable")]


def _search_cell(
    parts: Sequence[Callable[[], Records]], cosine: float, is_evaluation: bool, device: str
) -> Iterator[Array]:
    """Ranks that are found in a cell; two of its parts are in memory at once."""

    def tensors(records: Records) -> tuple[Tensor, Tensor]:
        ranks, features = (records[name].copy() for name in ("rank", "feature"))
        return torch.from_numpy(ranks).to(device), torch.from_numpy(features).to(device)

    for part in parts:
        asked = part()
        found = asked["rank"] == PICTURE
        for other in parts:
            if found.all():
                break
            better = asked if other is part else other()
            better = better[better["rank"] == PICTURE] if is_evaluation else better
            for home in (True, False):  # two guests of a cell meet in a home of theirs
                here, left = better["home"] == home, np.flatnonzero(~found & (asked["home"] | home))
                sides = *tensors(better[here]), *tensors(asked[left])
                found[left] = find_outranked(*sides, cosine).cpu().numpy()
        yield asked["rank"][found & (asked["rank"] != PICTURE)]


def cosine_of(degrees: float) -> float:
    """Cosine in steps of 2^-40, in which no mathematical library differs from another."""
    return round(math.cos(math.radians(degrees)) * 2**40) / 2**40


def are_within(left: Tensor, right: Tensor, cosine: float) -> Tensor:
    """Tell of each pair of rows [N, D], float16, whether its angle has at least this cosine."""
    left, right = left.double(), right.double()
    lengths = (left.square().sum(dim=1) * right.square().sum(dim=1)).sqrt()
    return (left * right).sum(dim=1) >= lengths * cosine


def find_outranked(
    better_ranks: Tensor, better: Tensor, ranks: Tensor, features: Tensor, cosine: float
) -> Tensor:
    """Mask [N] of the features [N, D] within the angle of a `better` one [B, D] of lower rank; all
    are float16, in ascending order of their ranks."""
    doubt = _largest_error(features)
    found = torch.zeros(len(ranks), dtype=torch.bool, device=ranks.device)
    for start in range(0, len(better), TILE):
        tile, numbers = better[start : start + TILE], better_ranks[start : start + TILE]
        left = torch.nonzero(~found & (ranks > numbers[0])).flatten()
        for some in torch.split(left, WIDTH) if len(left) else ():
            asked = features[some]
            dots = _unit(tile) @ _unit(asked).T
            if ranks[some[0]] <= numbers[-1]:
                dots.masked_fill_(numbers[:, None] >= ranks[some], -2.0)
            best = dots.amax(dim=0)
            found[some[best > cosine + doubt]] = True
            open_ = torch.nonzero((best - cosine).abs() <= doubt).flatten()
            close = dots[:, open_] >= cosine - doubt
            while len(open_):  # the best-ranked one that is left, for each
                first = close.int().argmax(dim=0)
                hit = are_within(tile[first], asked[open_], cosine)
                found[some[open_[hit]]] = True
                close[first, torch.arange(len(open_), device=first.device)] = False
                again = ~hit & close.any(dim=0)
                open_, close = open_[again], close[:, again]
    return found


def bound_guests(centres: Tensor, degrees: float) -> Tensor:
    """The most [C, C] by which a guest of one cell may be nearer to the centre of its home.

    Every pair within the angle shall meet in a cell that is the home of one of both. A feature's
    home is that of the nearest centre a; it is a guest in the cell of b, if its angle to the plane
    between a and b is at most half of `degrees`. That is enough. Let w be a - b. The signed angle
    of a unit vector z to the plane, asin(z · w / |w|), changes by no more than z turns. If x is at
    home with a, y with b, and both within the angle, then it is at most `degrees` less at y than at
    x. So x's angle from the plane on a's side and y's on b's add up to at most `degrees`, and one
    of the two is at most half of it. Nothing depends on which centres there are, or on which is
    called the nearest. Float32's largest error is added to all bounds.
    """
    slack, unit = _largest_error(centres), _unit(centres)
    apart = (unit @ unit.T).mul_(-2).add_(2 + 2 * slack).clamp_(min=0).sqrt_()
    return apart.mul_(math.sin(math.radians(degrees / 2))).add_(slack)


def find_cells(features: Tensor, centres: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, cell, whether that is its home) of every stay [M] of features [N, D] in cells."""
    unit, found = _unit(centres), []
    step = max(1, TILE * WIDTH // len(centres))
    for start in range(0, len(features), step):
        near = _unit(features[start : start + step]) @ unit.T
        best, home = near.max(dim=1)
        row, cell = torch.nonzero(best[:, None] - near <= bounds[home], as_tuple=True)
        found.append((row + start, cell, cell == home[row]))
    rows, cells, homes = (torch.cat(each) for each in zip(*found, strict=True))
    return rows, cells, homes


def _unit(features: Tensor) -> Tensor:
    return normalize(features.float())


def _largest_error(features: Tensor) -> float:
    """Of a float32 dot product of features, added in any order, and divided by their lengths."""
    return float((features.shape[1] + 16) * 2**-23)
