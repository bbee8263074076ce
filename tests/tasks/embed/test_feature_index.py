"""An index of features: what it finds, what it may miss, and what a kill leaves of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("faiss", reason="the extra `search` installs it")

from tasks.artifacts.artifact import Address, Artifact, Made, produce_artifact
from tasks.embed import feature_index
from tasks.embed.config import FEATURES, STAGE as EMBED
from tasks.embed.feature_index import FeatureIndex
from tasks.embed.search import Searched, Wanted, search_features
from tasks.progress import report_nothing

PER_SHARD, SHARDS, WIDTH = 500, 8, 32
SOURCES = {number: "even" if number % 2 == 0 else "odd" for number in range(SHARDS)}


def write_features(folder: Path) -> None:
    """Features around some hundred centres; the text of a sample lies near its image."""
    (folder / FEATURES).mkdir(parents=True)
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(100, WIDTH))
    for number in range(SHARDS):
        vectors = centres[draw.integers(0, 100, PER_SHARD)]
        vectors = vectors + 0.5 * draw.normal(size=vectors.shape)
        columns = {
            name: vectors + spread * draw.normal(size=vectors.shape)
            for name, spread in (("image", 0.0), ("text", 0.3))
        }
        pq.write_table(
            pa.table(
                {
                    "place": pa.array(range(PER_SHARD), pa.int32()),
                    "uid": [f"{number}-{place}" for place in range(PER_SHARD)],
                    **{name: as_column(one) for name, one in columns.items()},
                    "similarity": pa.array(draw.uniform(-1, 1, PER_SHARD), pa.float32()),
                }
            ),
            folder / FEATURES / f"{number:06d}.parquet",
        )


def as_column(vectors: np.ndarray) -> pa.Array:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    flat = pa.array(unit.astype(np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, WIDTH)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("runs")

    def make(out: Path) -> Made:
        write_features(out)
        return Made({"samples": PER_SHARD * SHARDS}, ())

    return produce_artifact(Address(root, EMBED, {}, {}), make)


@pytest.fixture(scope="module")
def index(embedded: Artifact) -> FeatureIndex:
    with pytest.MonkeyPatch.context() as small:
        small.setattr(feature_index, "PART_ROWS", 3 * PER_SHARD)
        return FeatureIndex(embedded.folder.parents[1], embedded, report_nothing)


def found(embedded: Artifact, index: FeatureIndex | None, number: int, wanted: Wanted) -> list:
    """The samples near the text of one of them."""
    texts = pq.read_table(embedded.folder / FEATURES / "000003.parquet", columns=["text"])["text"]
    query = np.array(texts[number].as_py(), dtype=np.float32)
    search_index = index and index.find_nearest
    return search_features([Searched(embedded.folder, SOURCES, search_index)], query, wanted)


WANTED = {
    "everything": Wanted(10),
    "one source": Wanted(10, "odd"),
    "good scores": Wanted(10, "", 0.5, 0.9),
    "very few": Wanted(10, "even", 0.995),
    "a source that is not there": Wanted(10, "nobody"),
}


@pytest.mark.parametrize("name", WANTED)
def test_reading_every_list_is_the_same_as_no_index(name: str, embedded, index) -> None:
    wanted = WANTED[name]._replace(is_exact=True)
    for number in range(5):
        true = found(embedded, None, number, wanted)
        said = found(embedded, index, number, wanted)
        assert [hit[1:4] for hit in said] == [hit[1:4] for hit in true]
        assert [h.likeness for h in said] == pytest.approx([h.likeness for h in true], abs=1e-6)
        for one in said:
            assert wanted.min_score <= one.score <= wanted.max_score
            assert wanted.source in ("", SOURCES[one.shard])


def test_few_lists_find_nearly_all_and_filters_leave_no_gaps(embedded, index) -> None:
    assert sum(len(rows) for _, rows in index._parts) == PER_SHARD * SHARDS
    assert index.made.counts["recall_at_10"] >= feature_index.LEAST_RECALL
    assert index.made.counts["probed"] < index._parts[0][0].nlist / 2
    for wanted in WANTED.values():
        true = [found(embedded, None, number, wanted) for number in range(20)]
        said = [found(embedded, index, number, wanted) for number in range(20)]
        assert list(map(len, said)) == list(map(len, true))
        shares = [
            len({a[1:4] for a in one} & {b[1:4] for b in other}) / max(1, len(one))
            for one, other in zip(true, said, strict=True)
        ]
        assert np.mean(shares) >= 0.8 or not true[0]


def test_a_part_that_a_killed_run_finished_is_kept_and_the_rest_made(
    embedded, index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_index, "PART_ROWS", 3 * PER_SHARD)
    write_part = feature_index._write_part

    def die(files: list[Path], target: Path) -> None:
        if target.stem != "000000":
            target.with_suffix(".npy").write_bytes(b"half")
            raise KeyboardInterrupt
        write_part(files, target)

    monkeypatch.setattr(feature_index, "_write_part", die)
    with pytest.raises(KeyboardInterrupt):
        feature_index.make_index(embedded, tmp_path, report_nothing)
    first = (tmp_path / "000000.faiss").stat()
    monkeypatch.setattr(feature_index, "_write_part", write_part)
    made = feature_index.make_index(embedded, tmp_path, report_nothing)
    assert len(made.bulk) == 6 and made.counts == index.made.counts
    assert (tmp_path / "000000.faiss").stat().st_mtime_ns == first.st_mtime_ns
    for file in made.bulk:
        assert file.read_bytes() == (index.made.folder / file.name).read_bytes()
