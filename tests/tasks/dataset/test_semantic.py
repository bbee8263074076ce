"""Features within an angle: the same samples as brute force in exact arithmetic finds."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tasks.dataset import semantic
from tasks.dataset.config import Seen
from tasks.dataset.semantic import (
    are_within,
    bound_guests,
    cosine_of,
    find_cells,
    find_near,
    find_outranked,
)
from tasks.progress import report_nothing

PER_SHARD = 50


def is_within(left: np.ndarray, right: np.ndarray, cosine: float) -> bool:
    """Whether left · right >= cosine |left| |right|, in fractions."""
    a, b = ([Fraction(float(number)) for number in one] for one in (left, right))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    if dot < 0:
        return False
    lengths = sum(x * x for x in a) * sum(y * y for y in b)
    return dot * dot >= Fraction(cosine) ** 2 * lengths


def halves(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def crowded(seed: int, count: int, width: int, spread: float) -> np.ndarray:
    """Unit features around a few centres, some equal, some a float16 step apart."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(5, width))
    rows = centres[draw.integers(5, size=count)] + spread * draw.normal(size=(count, width))
    rows[draw.integers(count, size=count // 8)] = rows[0]
    features = halves(rows)
    features[1] = features[0]
    features[2] = features[0]
    features[2, 0] = np.nextafter(features[2, 0], np.float16(2))
    return features


def brute(features: np.ndarray, degrees: float) -> set[int]:
    """Ranks (rows are in their order) with a better one within the angle."""
    wide = features.astype(np.float64)
    lengths = np.sqrt((wide**2).sum(1)[:, None] * (wide**2).sum(1)[None])
    near = wide @ wide.T >= cosine_of(degrees) * lengths
    return set(np.flatnonzero(np.triu(near, 1).any(axis=0)).tolist())


def search(
    folder: Path,
    features: np.ndarray,
    ranks: np.ndarray,
    degrees: float,
    pictures: np.ndarray | None = None,
    memory: int = 1 << 31,
) -> set[int]:
    """Ranks that are found among shards of these features, -1 of what takes no part."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    shards = []
    for first in range(0, len(features), PER_SHARD):
        part = features[first : first + PER_SHARD]
        lists = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), part.shape[1])
        places = pa.array(np.arange(len(part)), pa.int32())
        shards.append((folder / "shards" / f"{first}.parquet", first))
        pq.write_table(pa.table({"place": places, "image": lists}), shards[-1][0])
    seen = Seen(np.zeros(len(features), np.float32), shards)
    if pictures is not None:
        pictures.tofile(folder / "pictures")
    file = None if pictures is None else folder / "pictures"
    found = find_near(seen, ranks, file, degrees, memory, folder / "scratch", report_nothing)
    return set(found.tolist())


@pytest.mark.parametrize("degrees", [0.0, 0.01, 1.0, 7.5, 30.0, 90.0])
@pytest.mark.parametrize(("width", "spread"), [(3, 0.02), (16, 0.1), (64, 0.4)])
def test_semantic_duplicates_are_those_of_brute_force(tmp_path, degrees, width, spread):
    features = crowded(1, 500, width, spread)
    by_rank = np.random.default_rng(2).permutation(500)[:430]
    ranks = np.full(500, -1)
    ranks[by_rank] = np.arange(430)
    assert search(tmp_path / "a", features, ranks, degrees) == brute(features[by_rank], degrees)


def test_parts_threads_and_kills_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(semantic, "GROUP", 60)
    features, ranks = crowded(3, 600, 8, 0.1), np.random.default_rng(4).permutation(600)
    expected = brute(features[np.argsort(ranks)], 9.0)
    assert search(tmp_path / "parts", features, ranks, 9.0, memory=60 * 8 * 25) == expected
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(semantic, "_search_cell", kill_after(3, semantic._search_cell))
        with pytest.raises(RuntimeError, match="killed"):
            search(folder, features, ranks, 9.0)
    done = list((folder / "scratch" / "found").glob("[0-9]*"))
    assert done
    before = {file: file.stat().st_mtime_ns for file in done}
    assert search(folder, features, ranks, 9.0) == expected
    assert {file: file.stat().st_mtime_ns for file in done} == before


def kill_after(calls: int, work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, which fails when it is called for the last time."""
    left = iter(range(calls))

    def do(*args: Any) -> Any:
        if next(left, None) is None:
            raise RuntimeError("killed")
        return work(*args)

    return do


@pytest.mark.parametrize("degrees", [0.0, 5.0, 25.0])
def test_samples_near_to_pictures_are_those_of_brute_force_and_no_others(tmp_path, degrees):
    features = crowded(5, 400, 12, 0.2)
    pictures = np.concatenate([features[7:8], crowded(6, 60, 12, 0.2), -features[:20]])
    wide, shown = features.astype(np.float64), pictures.astype(np.float64)
    lengths = np.sqrt((wide**2).sum(1)[:, None] * (shown**2).sum(1)[None])
    near = (wide @ shown.T >= cosine_of(degrees) * lengths).any(axis=1)
    found = search(tmp_path / "a", features, np.arange(400), degrees, pictures)
    assert found == set(np.flatnonzero(near).tolist())
    assert 7 in found


SMALL = st.lists(st.integers(-3, 3), min_size=4, max_size=4).filter(any)


@settings(max_examples=60, deadline=None)
@given(st.lists(SMALL, min_size=2, max_size=12), st.sampled_from([0.0, 45.0, 60.0, 90.0]))
def test_what_lies_on_the_boundary_is_decided_as_in_fractions(rows, degrees):
    features = np.array(rows, dtype=np.float16) / np.float16(8)  # 60 degrees occur exactly
    cosine = cosine_of(degrees)
    ranks, halves_ = torch.arange(len(rows)), torch.from_numpy(features)
    found = find_outranked(ranks, halves_, ranks, halves_, cosine)
    for number, one in enumerate(features):
        expected = any(is_within(other, one, cosine) for other in features[:number])
        assert bool(found[number]) == expected
    both = are_within(halves_, halves_.flip(0), cosine)
    assert torch.equal(both, both.flip(0))


def test_the_order_of_addition_changes_no_dot_product():
    features = torch.from_numpy(crowded(8, 2000, 512, 0.3))
    turned = torch.randperm(512)
    for cosine in (cosine_of(one) for one in (0.0, 0.02, 3.0, 40.0)):
        left, right = features[:1000], features[1000:]
        plain = are_within(left, right, cosine)
        assert torch.equal(plain, are_within(left[:, turned], right[:, turned], cosine))
    exact = (left.double() * right.double()).sum(dim=1)
    one_by_one = torch.zeros(1000, dtype=torch.float64)
    for column in turned:
        one_by_one += left.double()[:, column] * right.double()[:, column]
    assert torch.equal(exact, one_by_one)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 5.0, 40.0]), st.integers(1, 9))
def test_every_pair_meets_in_the_home_of_one_of_both(seed, degrees, count):
    features = torch.from_numpy(crowded(seed, 60, 5, 0.15))
    centres = torch.nn.functional.normalize(features[:count].float() + 0.01)
    rows, cells, homes = find_cells(features, centres, bound_guests(centres, degrees))
    there = torch.zeros(60, count, dtype=torch.bool)
    there[rows, cells] = True
    home = torch.zeros(60, count, dtype=torch.bool)
    home[rows[homes], cells[homes]] = True
    assert bool((home.sum(dim=1) == 1).all())
    meets = (there[:, None] & home[None]).any(-1) | (home[:, None] & there[None]).any(-1)
    left, right = (
        each.flatten() for each in torch.meshgrid(*[torch.arange(60)] * 2, indexing="ij")
    )
    near = are_within(features[left], features[right], cosine_of(degrees)).reshape(60, 60)
    assert bool((meets | ~near).all())
