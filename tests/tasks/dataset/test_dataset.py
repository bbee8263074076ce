"""Dataset versions of small real shards: what each rule leaves out, what training then reads."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from evaclip_model.errors import InputError
from evaclip_model.reading.samples import SampleReader, Shard, ShardManifest, read_tombstones
from tasks.artifacts.artifact import Address, Artifact, Made, produce_artifact
from tasks.dataset.choose import Choice, find_asked, sort_by_kind
from tasks.dataset.config import DatasetConfig, OutsideFiles
from tasks.dataset.dataset import Takedowns, _keep_shards, make_dataset
from tasks.dataset.lists import read_hashes, read_takedowns, takedowns_digest
from tasks.index.sample_index import ShardVerdict
from tasks.merge.config import STAGE as MERGE, MergeConfig
from tasks.merge.merge import merge_sources
from tasks.progress import report_nothing
from tasks.verify.config import STAGE as VERIFY, VerifyConfig
from tasks.verify.verify import verify_shards
from tests.tasks.merge import metadata

Images = dict[str, bytes]


def picture(seed: int, side: int = 64, quality: int = 90) -> bytes:
    """A JPEG of smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


def url_of(uid: str) -> str:
    return f"https://a.example/{uid}.jpg"


def write_shard(downloaded: Path, name: str, source: str, images: Images) -> None:
    """A shard whose samples' uids are the keys of `images`."""
    (downloaded / "shards").mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(downloaded / "shards" / f"{name}.tar")) as tar:
        for number, (uid, image) in enumerate(images.items()):
            record = {"uid": uid, "source": source, "url": url_of(uid)}
            tar.write(
                {
                    "__key__": f"{name}{number:04d}",
                    "jpg": image,
                    "txt": f"caption of {uid}",
                    "json": json.dumps(record),
                }
            )


def verified_of(root: Path, *shards: tuple[str, Images]) -> Artifact:
    """The verification of shards, each (source, images)."""
    downloaded = root / "download" / "d"
    for number, (source, images) in enumerate(shards):
        write_shard(downloaded, f"{number:06d}", source, images)
    config = VerifyConfig(max_bad_share=0.5)
    address = Address.of(root, VERIFY, config, {"download": "d"})
    return produce_artifact(
        address, lambda out: verify_shards(config, downloaded, out, 2, report_nothing)
    )


@pytest.fixture
def verified(tmp_path: Path) -> Artifact:
    """Ten different pictures in two shards, a0 to a5 and b0 to b3."""
    return verified_of(
        tmp_path / "runs",
        ("laion2b", {f"a{n}": picture(n) for n in range(6)}),
        ("coyo700m", {f"b{n}": picture(100 + n) for n in range(4)}),
    )


def version(
    verified: Artifact,
    name: str = "v",
    outside: OutsideFiles | None = None,
    takedowns: Takedowns | None = None,
    **settings: object,
) -> tuple[Path, Made]:
    """Folder and totals of a version."""
    out = verified.folder.parents[1] / "dataset" / name
    out.mkdir(parents=True)
    config = DatasetConfig.from_mapping(settings, where="test")
    made = make_dataset(
        config, [verified], outside or OutsideFiles(), takedowns or Takedowns(), out, report_nothing
    )
    return out, made


def takedowns_of(*entries: str) -> Takedowns:
    return Takedowns(entries, lambda index: find_asked(index, sort_by_kind(entries)))


def captions(folder: Path, manifest: str = "shards.json") -> list[str]:
    """What the trainer's reader finds in all shards of a version."""
    found: list[str] = []
    for shard in ShardManifest.read(folder / manifest).shards:
        reader = SampleReader(folder / shard.path, read_tombstones(str(folder), shard))
        pairs = reader.read(0, shard.samples)
        assert len(pairs) == shard.samples
        assert reader.read(shard.samples, shard.samples + 1) == []
        found += [pair.caption for pair in pairs]
        reader.close()
    return found


def uids_read(folder: Path, manifest: str = "shards.json") -> list[str]:
    return [caption.removeprefix("caption of ") for caption in captions(folder, manifest)]


ALL = [f"a{n}" for n in range(6)] + [f"b{n}" for n in range(4)]


def without(*uids: str) -> list[str]:
    return [uid for uid in ALL if uid not in uids]


def test_lists_of_uids_keep_and_drop(verified: Artifact, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("a5\nb0\na1\nno such uid\n")
    (tmp_path / "drop.txt").write_text("b0\na0\n")
    keep, drop = (tmp_path / "keep.txt",), (tmp_path / "drop.txt",)
    for outside, left, counts in (
        (OutsideFiles(keep_uids=keep), ["a1", "a5", "b0"], {"not_listed": 7}),
        (
            OutsideFiles(drop_uids=drop),
            [*map("a{}".format, range(1, 6)), "b1", "b2", "b3"],
            {"listed": 2},
        ),
        (
            OutsideFiles(keep_uids=keep, drop_uids=drop),
            ["a1", "a5"],
            {"not_listed": 7, "listed": 1},
        ),
    ):
        folder, made = version(verified, f"v{len(left)}", outside)
        assert captions(folder) == [f"caption of {uid}" for uid in left]
        assert {name: made.counts[f"left_out.{name}"] for name in counts} == counts


def test_without_anything_to_leave_out_every_sample_is_read(verified: Artifact) -> None:
    folder, made = version(verified)
    assert uids_read(folder) == ALL
    assert made.counts["samples"] == 10
    assert made.counts["left_out"] == 0
    assert made.counts["laion2b.samples"] == 6
    assert "tombstones" not in (folder / "shards.json").read_text()


def test_bad_samples_become_tombstones_and_bad_shards_are_no_longer_there(tmp_path: Path) -> None:
    verified = verified_of(
        tmp_path / "runs",
        ("laion2b", {"a0": picture(0), "a1": b"no image", "a2": picture(2)}),
        ("laion2b", {"a3": b"x", "a4": b"x", "a5": picture(5)}),
    )
    folder, made = version(verified)
    assert uids_read(folder) == ["a0", "a2"]
    (shard,) = ShardManifest.read(folder / "shards.json").shards
    assert (shard.samples, read_tombstones(str(folder), shard)) == (2, {1})
    assert made.counts["left_out.bad.undecodable"] == 1
    assert made.counts["left_out.shard"] == 3


def test_the_same_bytes_are_kept_once_the_first_time(tmp_path: Path) -> None:
    images = {f"a{n}": picture(n) for n in range(3)}
    verified = verified_of(
        tmp_path / "runs",
        ("laion2b", {**images, "a9": picture(1)}),
        ("coyo700m", {"b0": picture(1), "b1": picture(7), "b2": picture(2)}),
    )
    folder, made = version(verified)
    assert uids_read(folder) == ["a0", "a1", "a2", "b1"]
    assert made.counts["left_out.exact_duplicate"] == 3
    assert uids_read(version(verified, "kept", exact_duplicates="keep")[0]) == [
        *("a0", "a1", "a2", "a9", "b0", "b1", "b2")
    ]


def test_a_uid_is_kept_once(tmp_path: Path) -> None:
    verified = verified_of(
        tmp_path / "runs",
        ("laion2b", {"a0": picture(0), "a1": picture(1)}),
        ("laion2b", {"a1": picture(2), "a2": picture(3)}),
    )
    folder, made = version(verified, exact_duplicates="keep")
    assert uids_read(folder) == ["a0", "a1", "a2"]
    assert made.counts["left_out.repeated_uid"] == 1


def test_what_looks_the_same_is_kept_once_where_that_is_asked_for(tmp_path: Path) -> None:
    verified = verified_of(
        tmp_path / "runs",
        ("laion2b", {"a0": picture(0), "a1": picture(1), "a2": picture(0, side=50)}),
        ("laion2b", {"a3": picture(1, quality=60), "a4": picture(4)}),
    )
    assert uids_read(version(verified, "exact")[0]) == ["a0", "a1", "a2", "a3", "a4"]
    folder, made = version(verified, "near", near_duplicates="drop")
    assert uids_read(folder) == ["a0", "a1", "a4"]
    assert made.counts["left_out.near_duplicate"] == 2


@pytest.mark.parametrize("layout", ["folder", "webdataset"])
def test_evaluation_images_are_left_out_by_their_bytes_and_by_their_look(
    verified: Artifact, tmp_path: Path, layout: str
) -> None:
    test_set = tmp_path / "test set" / "deep"
    test_set.mkdir(parents=True)
    images = {"1.jpg": picture(2), "2.jpg": picture(101, side=40, quality=70), "3.jpg": picture(55)}
    images |= {"4.jpg": b"cannot be decoded"}
    if layout == "folder":
        for name, image in images.items():
            (test_set / name).write_bytes(image)
    else:
        with tarfile.open(test_set / "0.tar", "w") as tar:
            for name, content in {**images, "1.cls": b"7"}.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    outside = OutsideFiles(evaluation_sets=(test_set.parent,))
    folder, made = version(verified, outside=outside, evaluation_sets=["x"])
    assert uids_read(folder) == without("a2", "b1")
    assert made.counts["left_out.evaluation"] == 2
    assert "looked for: `x`" in (folder / "card.md").read_text()


def test_an_evaluation_set_without_images_is_one_sentence(
    verified: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    outside = OutsideFiles(evaluation_sets=(tmp_path / "empty",))
    with pytest.raises(InputError, match="empty holds no image"):
        version(verified, outside=outside)


def test_blocked_hashes_are_left_out(verified: Artifact, tmp_path: Path) -> None:
    md5 = hashlib.md5(picture(3)).hexdigest().upper()
    sha256 = hashlib.sha256(picture(102)).hexdigest()
    (tmp_path / "md5").write_text(f"# a list\n\n{md5}  file name\n")
    (tmp_path / "sha256").write_text(f"{sha256}\n{'0' * 64}\n")
    outside = OutsideFiles(blocklists=(tmp_path / "md5", tmp_path / "sha256"))
    folder, made = version(verified, outside=outside)
    assert uids_read(folder) == without("a3", "b2")
    assert made.counts["left_out.blocked"] == 2


def test_a_line_that_is_no_hash_is_named(tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"{'a' * 32}\nhttp://a.example/\n")
    with pytest.raises(InputError, match=r"list, line 2: expected an MD5 .* got 'http://a.exam"):
        read_hashes([tmp_path / "list"])


@pytest.mark.parametrize(
    "entry", ["a1", "https://a.example/a1.jpg", hashlib.sha256(picture(1)).hexdigest()]
)
def test_a_takedown_names_a_sample_by_uid_url_or_hash(verified: Artifact, entry: str) -> None:
    takedowns = takedowns_of(entry)
    folder, made = version(verified, takedowns=takedowns)
    assert uids_read(folder) == without("a1")
    assert made.counts["left_out.takedown"] == 1
    assert (folder / "takedowns.txt").read_text() == f"{entry}\n"


def test_a_takedown_takes_copies_with_it_and_brings_none_back(tmp_path: Path) -> None:
    verified = verified_of(
        tmp_path / "runs",
        ("laion2b", {"a0": picture(0), "a1": picture(1)}),
        ("coyo700m", {"b0": picture(0), "b1": picture(5)}),
    )
    takedowns = takedowns_of("a0")
    deduplicated, _ = version(verified, "deduplicated", takedowns=takedowns)
    assert uids_read(deduplicated) == ["a1", "b1"]
    folder, made = version(verified, takedowns=takedowns, exact_duplicates="keep")
    assert uids_read(folder) == ["a1", "b1"]
    assert made.counts["left_out.takedown"] == 2


def test_a_version_after_another_is_the_one_made_from_scratch(verified: Artifact) -> None:
    takedowns = takedowns_of("a1", "b3")
    before, _ = version(verified, "before", takedowns=takedowns_of("a1"))
    scratch, first = version(verified, "scratch", takedowns=takedowns)
    after, second = version(verified, "after", takedowns=replace(takedowns, before=before))
    assert first.counts == second.counts
    for name in ("shards.json", "takedowns.txt", "report.json"):
        assert (scratch / name).read_bytes() == (after / name).read_bytes()
    assert pq.read_table(scratch / "left_out.parquet") == pq.read_table(after / "left_out.parquet")


def test_a_share_is_held_out_by_uid_and_a_takedown_reaches_it(verified: Artifact) -> None:
    folder, made = version(verified, validation_share=0.4)
    held = uids_read(folder, "validation.json")
    assert sorted([*held, *uids_read(folder)]) == sorted(ALL) and 0 < len(held) < 10
    assert made.counts["samples"] + made.counts["validation"] == 10
    assert folder / "validation.json" in made.files
    fewer, _ = version(verified, "less", takedowns=takedowns_of(held[0]), validation_share=0.4)
    assert uids_read(fewer, "validation.json") == held[1:]
    assert uids_read(fewer) == uids_read(folder)


def test_a_line_that_is_no_takedown_is_named(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("a1\nftp://a.example/x y\n")
    with pytest.raises(InputError, match=r"list, line 2: expected a URL .* got 'ftp://a.example"):
        read_takedowns([tmp_path / "list"])


def test_a_takedown_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("https://a.example/1\n", encoding="utf-8-sig")
    assert read_takedowns([tmp_path / "list"]) == ("https://a.example/1",)


def test_takedowns_are_known_by_what_they_say_however_they_are_spread(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("b\na\n")
    (tmp_path / "2").write_text("# of March\na\n\n")
    (tmp_path / "3").write_text("a\nb")
    both = read_takedowns([tmp_path / "1", tmp_path / "2"])
    assert takedowns_digest(both) == takedowns_digest(read_takedowns([tmp_path / "3"]))
    assert takedowns_digest(both) != takedowns_digest(("a",))


def test_a_version_with_nothing_left_is_one_sentence(verified: Artifact) -> None:
    with pytest.raises(InputError, match="nothing is left of 10 samples: 10 takedown"):
        version(verified, takedowns=takedowns_of(*ALL))


def test_every_sample_has_the_first_reason_alone() -> None:
    choice = Choice(5)
    choice.leave_out(np.array([1, 3]), "first")
    choice.leave_out(np.array([False, True, True, False, False]), "second")
    assert choice.to_table().to_pylist() == [
        {"row": 1, "reason": "first"},
        {"row": 2, "reason": "second"},
        {"row": 3, "reason": "first"},
    ]
    assert choice.count_reasons(0, 3) == {"first": 1, "second": 1}
    assert Choice.from_table(5, choice.to_table()).to_table() == choice.to_table()


def test_the_card_says_how_much_there_is_and_what_was_left_out(tmp_path: Path) -> None:
    verified = verified_of(tmp_path / "runs", ("laion2b", {"a0": picture(0), "a1": picture(0)}))
    folder, _ = version(verified)
    card = (folder / "card.md").read_text()
    assert "1 image-text pairs in 1 shards" in card
    assert "| exact_duplicate | 1 |" in card
    assert f"| verify | `{verified.digest}` |" in card


def test_the_card_says_how_the_merge_balanced_and_what_another_t_would_keep(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    rows = [{"url": f"https://a.example/{n}", "caption": "a cat"} for n in range(40)]
    path = metadata.write(tmp_path / "made.parquet", metadata.RELAION, rows)
    settings = {
        "sources": [{"name": "made", "files": str(path)}],
        "balance": {"t": 8, "entries": 1},
    }
    config = MergeConfig.from_mapping(settings, where="test")
    merged = produce_artifact(
        Address.of(root, MERGE, config),
        lambda out: merge_sources(config, {"made": [path]}, out, threads=1),
    )
    verified = verified_of(root, ("made", {"a0": picture(0)}))
    out = root / "dataset" / "v"
    out.mkdir(parents=True)
    found = [merged, verified]
    make_dataset(DatasetConfig(), found, OutsideFiles(), Takedowns(), out, report_nothing)
    card = (out / "card.md").read_text()
    assert "Balanced: 40 matches of 1 entries, 1 of which more than t = 8 rows hold (40" in card
    assert f"| 8 | {merged.counts['selected']} |" in card and "| 64 | 40 |" in card
    assert f"| too_frequent | {40 - merged.counts['selected']} |" in card


def test_making_a_manifest_compares_all_rows_once_not_once_a_shard(tmp_path):
    class CountingChoice(Choice):
        comparisons = 0

        @property
        def left_out(self):
            self.comparisons += 1
            return super().left_out

    shard = Shard(path="0.tar", source="s", samples=4, bytes=1, sha256="a" * 64)
    verdicts = [
        ShardVerdict(path=f"{n}.tar", stored=4, shard=shard, flaws={}, left_out=None)
        for n in range(5)
    ]
    choice = CountingChoice(20)
    choice.leave_out(np.array([0, 5, 6]), "exact_duplicate")
    verify, dataset = tmp_path / "verify", tmp_path / "dataset"
    dataset.mkdir()
    with (dataset / "tombstones.bin").open("wb") as bits:
        shards, by_source = _keep_shards(verdicts, verify, choice, bits, choice.left_out)
    assert choice.comparisons == 1
    assert [found.samples for found in shards] == [3, 2, 4, 4, 4]
    left_out = [read_tombstones(str(dataset), found) for found in shards]
    assert left_out == [{0}, {1, 2}, set(), set(), set()]
    assert by_source["s"]["left_out.exact_duplicate"] == 3
