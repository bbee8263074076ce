"""Further captions: joined to a dataset version, counted, and drawn the same on any ranks."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaclip_model.errors import InputError
from evaclip_model.reading import open_webdataset
from evaclip_model.reading.config import SamplingConfig
from evaclip_model.reading.reader import BatchReader, ReadSettings
from evaclip_model.reading.samples import ShardManifest, read_captions
from tasks.artifacts.artifact import Artifact
from tasks.dataset.config import CaptionSource, OutsideFiles
from tasks.dataset.dataset import Takedowns
from tests.tasks.dataset.test_dataset import (
    picture,
    takedowns_of,
    url_of,
    verified,
    verified_of,
    version,
)

__all__ = ["verified"]


def sidecar(file: Path, **settings: Any) -> OutsideFiles:
    config = CaptionSource.from_mapping(
        {"name": "recap", "files": str(file), **settings}, where="test"
    )
    return OutsideFiles(captions=((config, (str(file),)),))


def further(folder: Path) -> dict[str, Any]:
    """Key in its shard -> further captions, of all shards of a version."""
    found: dict[str, Any] = {}
    for shard in ShardManifest.read(folder / "shards.json").shards:
        found |= read_captions(str(folder / shard.captions)) if shard.captions else {}
    return found


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_captions_by_uid_are_counted_and_stand_beside_their_shards(
    verified: Artifact, tmp_path: Path
) -> None:
    texts = ["new a0", "new b3", None, "nobody's", " "]
    file = write_parquet(
        tmp_path / "a.parquet", uid=["a0", "b3", "a1", "nobody", "a2"], caption=texts
    )
    folder, made = version(verified, outside=sidecar(file))
    assert further(folder) == {
        "0000000000": {"recap": ["new a0"]},
        "0000010003": {"recap": ["new b3"]},
    }
    expected = {"rows": 5, "unusable": 2, "matched": 2, "without_sample": 1}
    assert json.loads((folder / "report.json").read_text())["captions"] == {"recap": expected}
    assert made.counts["captions.recap.matched"] == 2
    assert "| recap | 5 | 2 | 1 | 2 |" in (folder / "card.md").read_text()
    assert {path.name for path in made.bulk} == {"000000.jsonl.gz", "000001.jsonl.gz"}
    opened = open_webdataset(folder / "shards.json").decode().to_tuple("__key__", "captions.json")
    read = dict(opened)
    assert {key: captions for key, captions in read.items() if captions} == further(folder)
    assert len(read) == made.counts["samples"]


@pytest.mark.parametrize("by", ["url", "sha256", "key", "numbers"])
def test_keys_match_by_value_whatever_their_type(
    verified: Artifact, tmp_path: Path, by: str
) -> None:
    keys: dict[str, list[Any]] = {
        "url": [url_of("a1").replace("https:", "http:"), "https://b.example"],
        "sha256": [hashlib.sha256(picture(1)).hexdigest().upper(), "ff"],
        "key": ["0", "77"],
        "numbers": [0.0, 77.0],
    }
    name = "key" if by == "numbers" else by
    file = write_parquet(tmp_path / "a.parquet", mine=keys[by], text=[b"one", b"two"])
    folder, made = version(verified, outside=sidecar(file, key=name, key_column="mine"))
    place = "0000000000" if name == "key" else "0000000001"
    assert further(folder) == {place: {"recap": ["one"]}}
    assert made.counts["captions.recap.without_sample"] == 1


def test_json_lines_may_hold_several_captions_a_row_and_a_bad_line_costs_itself(
    verified: Artifact, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"uid": "a0", "caption": ["x", "", None, "y"]}, {"uid": "b1", "caption": "[1984"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{no json\n")
    folder, made = version(verified, outside=sidecar(file))
    assert further(folder) == {
        "0000000000": {"recap": ["x", "y"]},
        "0000010001": {"recap": ["[1984"]},
    }
    assert made.counts["captions.recap.unusable"] == 1


def test_a_key_that_two_samples_have_names_neither_without_a_source(tmp_path: Path) -> None:
    verified = verified_of(
        tmp_path / "one's runs",
        ("laion2b", {"a0": picture(0), "a1": picture(1)}),
        ("coyo700m", {"b0": picture(2), "b1": picture(3)}),
    )
    file = write_parquet(tmp_path / "a.parquet", uid=["a0", "b1"], caption=["one", "two"])
    folder, _ = version(verified, outside=sidecar(file, source="coyo700m"))
    assert further(folder) == {"0000010001": {"recap": ["two"]}}


@pytest.mark.parametrize(
    ("columns", "settings", "said"),
    [
        ({"id": ["a0"], "caption": ["x"]}, {}, r"no column that is its key, .* are id, caption"),
        ({"uid": ["a0"], "words": ["x"]}, {}, r"no column that is its caption.* set 'caption'"),
        ({"uid": ["a0"], "words": ["x"]}, {"caption": "text"}, "has no column 'text'"),
        ({"uid": ["q"], "text": ["x"]}, {}, "none of 1 rows of .* names a sample by its uid"),
    ],
)
def test_a_sidecar_that_fits_nothing_is_one_sentence(
    verified: Artifact, tmp_path: Path, columns: Any, settings: Any, said: str
) -> None:
    file = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(InputError, match=said):
        version(verified, outside=sidecar(file, **settings))


def test_a_takedown_keeps_the_captions_of_the_version_before(
    verified: Artifact, tmp_path: Path
) -> None:
    file = write_parquet(tmp_path / "a.parquet", uid=["a0", "b3"], caption=["x", "y"])
    before, _ = version(verified, "before", outside=sidecar(file))
    asked = takedowns_of("a1")
    after, made = version(verified, "after", takedowns=Takedowns(asked.entries, asked.find, before))
    assert further(after) == further(before)
    assert made.counts["captions.recap.matched"] == 2
    assert made.counts["left_out.takedown"] == 1


def test_every_draw_is_the_same_on_any_number_of_ranks_and_from_any_step(tmp_path: Path) -> None:
    images = {f"a{n}": picture(n, side=20) for n in range(36)}
    verified = verified_of(tmp_path / "runs", ("laion2b", images))
    uids = [f"a{n}" for n in range(0, 36, 2)]
    file = write_parquet(
        tmp_path / "a.parquet", uid=uids, caption=[[f"1 of {u}", f"2 of {u}"] for u in uids]
    )
    folder, _ = version(verified, outside=sidecar(file))
    config = SamplingConfig(
        image_px=16,
        global_batch=12,
        lanes=6,
        shuffle_buffer=4,
        caption_weights={"stored": 1, "recap": 2},
    )

    def shown(ranks: int, first: int = 0, workers: int = 0) -> list[list[str]]:
        steps: list[list[str]] = [[] for _ in range(first, 9)]
        for rank in range(ranks):
            settings = ReadSettings(workers=workers)
            with closing(
                BatchReader(
                    folder / "shards.json", config, rank=rank, ranks=ranks, settings=settings
                )
            ) as reader:
                for step, batch in enumerate(reader.iterate_batches(first, 9)):
                    steps[step] += batch.captions
        return steps

    alone = shown(1)
    assert shown(2) == shown(3) == alone
    assert shown(1, first=5) == alone[5:]
    assert shown(1, workers=2) == alone
    said = [caption for step in alone for caption in step]
    kinds = {kind: sum(one.startswith(kind) for one in said) for kind in ("caption", "1", "2")}
    assert all(kinds.values())
    assert kinds["caption"] > kinds["1"] + kinds["2"], "every second sample has none"
