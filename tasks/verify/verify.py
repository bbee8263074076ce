"""Verify every shard of a download, continuing where a killed run stopped, and index every sample:
read every sample, decode every image, keep what is found as a table a shard.

`python -m tasks.verify.verify JOB.json` is one of the processes that share the shards, here or on
other machines: decoding holds Python's lock for a good part of its time. Not here: what training
reads of them, comparing samples of different shards (tasks/dataset).
"""

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.files import replace_file, write_atomically
from evaclip_model.reading import image_decoder
from evaclip_model.reading.samples import BrokenShard, Sample, Shard, read_samples
from evaclip_model.reading.urls import locate_file
from tasks.artifacts.artifact import Made, read_bulk, sha256_of
from tasks.index import adopted_shards, sample_index
from tasks.index.perceptual_hash import grey_of, hashes_of
from tasks.process.launch import RankLaunch, RankState, iterate_starts, run_ranks, run_share
from tasks.progress import Report
from tasks.verify.config import VerifyConfig

REPORT = "report.json"
TABLES = ".tables"
"""One small table for each verified shard, kept until the index is there."""
_VERDICT = b"verdict"


class ShardJob(Config):
    location: str
    """Path or URL; our downloader's table and statistics lie beside it or not at all."""
    size: int | None
    """Bytes that it should have; None if unknown."""
    path: str
    """What the verdict calls it."""
    target: Path
    """A parquet file: a row a sample (the columns of the index), the verdict in its metadata."""
    source: str | None
    """The recipe's name for the collection, if somebody else made the shard: its samples' source,
    whatever their records say, and no share of bad samples is too large. None: ours."""
    name: str
    """Of the shard, unique in its source."""


def verify_shards(
    config: VerifyConfig,
    downloaded: Path,
    out: Path,
    processes: int,
    report: Report,
    launch: RankLaunch | None = None,
) -> Made:
    """Verify every shard that `downloaded`, the folder of a download or of an adoption, lists
    (`ADOPTED`, or tars as bulk); without a list, `**/shards/*.tar`.

    Each of the `processes`, which are of this machine or those of a `launch` over several, takes
    about 0.1 GB; who verifies a shard judges it, here they are counted. That no shard can be
    trained on, or that one changed since it was adopted, is an `InputError`.
    """
    if not (out / sample_index.CHECKED).exists():
        listed = _list_jobs(downloaded, out)
        if not listed:
            raise InputError(f"{downloaded} holds no shards: download again")
        tables = [job.target for job in listed]
        _verify_missing(config, listed, out, processes, report, launch)
        verdicts = [read_verdict(table) for table in tables]
        if not any(verdict.shard for verdict in verdicts):
            raise InputError(
                f"none of the {len(listed)} shards of {downloaded} can be trained on; "
                f"{verdicts[0].path}: {verdicts[0].left_out}"
            )
        report(len(listed), len(listed), "indexing")
        sample_index.write_index(tables, out / sample_index.INDEX, config.memory_limit)
        left_out = {verdict.path: verdict.left_out for verdict in verdicts if verdict.left_out}
        details = {**_count_verdicts(verdicts), "left_out": left_out}
        write_atomically(out / REPORT, json.dumps(details, indent=1) + "\n")
        sample_index.write_verdicts(verdicts, out)  # the last, because it says that all is there
    shutil.rmtree(out / TABLES, ignore_errors=True)
    index = sorted((out / sample_index.INDEX).rglob("*.parquet"))
    return Made(
        _count_verdicts(sample_index.read_verdicts(out)),
        (out / sample_index.CHECKED, out / REPORT, *index),
    )


def _list_jobs(downloaded: Path, out: Path) -> list[ShardJob]:
    """The shards, in the order of their names, or in that of the adoption's list.

    A shard that the download's list names and the folder lacks is among them, so that it is missed.
    """
    found: list[tuple[str, int | None, str | None, str]]
    if (downloaded / adopted_shards.ADOPTED).exists():
        shards = adopted_shards.read_adopted(downloaded)
        _refuse_changed(shards)
        found = [(one.location, one.size, one.source, one.name) for one in shards]
    else:
        # without a list: from before there were any, or packed by hand
        sizes = read_bulk(downloaded) or dict.fromkeys(downloaded.glob("**/shards/*.tar"))
        tars = sorted(path for path in sizes if path.suffix == ".tar")
        found = [(str(tar.resolve()), sizes[tar], None, tar.name) for tar in tars]
    return [
        ShardJob(
            location=location,
            size=size,
            path=sample_index.relative_path(location, out.resolve()),
            target=(out / TABLES / f"{number:06d}.parquet").resolve(),
            source=source,
            name=name,
        )
        for number, (location, size, source, name) in enumerate(found)
    ]


def _refuse_changed(shards: Sequence[adopted_shards.AdoptedShard]) -> None:
    # Those that were packed are nobody else's to change, and may lie in the root's store by now.
    shards = [one for one in shards if locate_file(one.location) == one.location]
    found = adopted_shards.sizes_and_marks([shard.location for shard in shards])
    pairs = zip(shards, found, strict=True)
    changed = [shard.location for shard, now in pairs if now != (shard.size, shard.mark)]
    if changed:
        raise InputError(
            f"{len(changed):,} of {len(shards):,} adopted shards changed or are gone since they "
            f"were adopted, the first is {changed[0]}: run again to adopt what is there now"
        )


def _verify_missing(
    config: VerifyConfig,
    listed: Sequence[ShardJob],
    out: Path,
    processes: int,
    report: Report,
    launch: RankLaunch | None,
) -> None:
    folder = out / TABLES
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(".*"):
        torn.unlink()
    local = (Path(job.location) for job in listed if "://" not in job.location)
    reads = tuple(sorted({path.parent for path in local}))
    find_missing = lambda: [job for job in listed if not job.target.exists()]  # noqa: E731
    for missing in iterate_starts(find_missing, len, out):
        before = len(listed) - len(missing)

        def look(states: Sequence[RankState], before: int = before) -> None:
            report(before + sum(one.done for one in states), len(listed), "shards")

        job, ranks = VerifyJob(config=config, shards=tuple(missing)), min(processes, len(missing))
        run_ranks(
            *("tasks.verify.verify", job, out.resolve() / "job.json", ranks),
            *(look, launch, reads, False),
        )


def _count_verdicts(verdicts: Sequence[sample_index.ShardVerdict]) -> dict[str, int | float]:
    usable = [verdict for verdict in verdicts if verdict.shard is not None]
    flaws = sum((Counter(verdict.flaws) for verdict in usable), Counter[str]())
    counts: dict[str, int | float] = {
        "shards": len(usable),
        "shards_left_out": len(verdicts) - len(usable),
        "samples": sum(verdict.stored for verdict in usable) - flaws.total(),
        "samples_left_out": sum(v.stored for v in verdicts if v.shard is None),
        "bytes": sum(verdict.shard.bytes for verdict in usable if verdict.shard),
    }
    return counts | {f"bad.{flaw}": flaws[flaw] for flaw in sorted(flaws)}


class Flaw(StrEnum):
    """A reason why a sample cannot be trained on, apart from `MemberFlaw`."""

    UNDECODABLE = "undecodable"
    TOO_SMALL = "too_small"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_COSTLY = "too_costly"
    """Decoding takes more CPU time than an honest image of its size."""
    DAMAGED = "damaged"
    """A JPEG whose lost content libjpeg fills by guesses."""
    EMPTY_CAPTION = "empty_caption"
    REPEATED_UID = "repeated_uid"


def verify_shard(tar: Path, job: ShardJob, config: VerifyConfig) -> None:
    """Read `tar`, the file of a job, to its end and write what was found to the job's target."""
    seen = _Seen(config, job)
    left_out = None
    try:
        for sample in read_samples(tar):
            seen.look_at(sample)
        if job.size is not None and tar.stat().st_size != job.size:
            left_out = f"it has {tar.stat().st_size} bytes, but {job.size} when it was listed"
        elif job.source is None:
            left_out = _why_not_as_recorded(tar, seen)
        left_out = left_out or _why_left_out(seen, config)
    except BrokenShard as problem:
        left_out = str(problem)
    except MemoryError:
        raise
    except Exception as problem:  # whatever a stranger's bytes cause is the verdict on them
        left_out = f"it cannot be read ({type(problem).__name__}: {problem})"
    shard = None
    if left_out is None:
        (source,) = seen.named_sources
        shard = Shard(
            path=job.path,
            source=source,
            samples=seen.samples,
            bytes=tar.stat().st_size,
            sha256=sha256_of(tar),
        )
    verdict = sample_index.ShardVerdict(
        path=job.path, stored=seen.samples, shard=shard, flaws=dict(seen.flaws), left_out=left_out
    )
    table = seen.to_table().replace_schema_metadata({_VERDICT: verdict.model_dump_json()})
    with replace_file(job.target) as beside:
        pq.write_table(table, beside, compression="zstd")


def read_verdict(target: Path) -> sample_index.ShardVerdict:
    metadata = pq.read_metadata(target).metadata
    return sample_index.ShardVerdict.from_mapping(json.loads(metadata[_VERDICT]), where=str(target))


@dataclass
class _Seen:
    config: VerifyConfig
    job: ShardJob
    rows: list[dict[str, Any]] = field(default_factory=list)
    greys: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    uids: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)
    flaws: Counter[str] = field(default_factory=Counter)

    @property
    def samples(self) -> int:
        return len(self.rows)

    @property
    def named_sources(self) -> set[str]:
        """Sources that the records name; a sample without a record has its neighbours'."""
        return self.sources - {""} or {""}

    def look_at(self, sample: Sample) -> None:
        """Note what a sample is; whatever it holds, it costs nothing but itself."""
        grey: npt.NDArray[np.uint8] | None = None
        flaw: str | None = sample.flaw
        if sample.image or flaw is None:
            grey, problem = _decode_image(sample.image, self.config)
            flaw = flaw or problem
        if flaw is None and not sample.caption.strip():
            flaw = Flaw.EMPTY_CAPTION
        row = self._identity(sample)
        if row["uid"] in self.uids:
            flaw = Flaw.REPEATED_UID
        if flaw is not None:
            self.flaws[str(flaw)] += 1
        if grey is not None:
            self.greys.append(grey)
        self.uids.add(row["uid"])
        self.sources.add(row["source"])
        self.rows.append({**row, "phash": None if grey is None else 0, "flaw": flaw})

    def _identity(self, sample: Sample) -> dict[str, Any]:
        record = sample.record
        url = _text_field(record, "url")
        source = self.job.source if self.job.source is not None else _text_field(record, "source")
        identity = f"{source}\n{self.job.name}\n{sample.key}"
        if url is not None:  # as a merge would name the row
            identity = f"{sample_index.without_scheme(url)}\n{sample.caption}"
        md5 = _text_field(record, "md5")
        return {
            "key": _writable(sample.key),
            "uid": _text_field(record, "uid") or _md5(identity.encode(errors="replace")),
            "source": source or "",
            "original_id": _text_field(record, "original_id"),
            "url": url,
            "sha256": _text_field(record, "sha256"),
            "stored_sha256": hashlib.sha256(sample.image).hexdigest() if sample.image else None,
            "md5": md5 or (_md5(sample.image) if sample.image else None),
        }

    def to_table(self) -> pa.Table:
        """A row a sample, with the perceptual hashes of all that could be decoded."""
        table = pa.Table.from_pylist(self.rows, schema=sample_index.COLUMNS)
        decoded = table["phash"].is_valid().to_numpy()
        hashes = np.zeros(self.samples, dtype=np.uint64)
        if self.greys:
            hashes[decoded] = hashes_of(np.stack(self.greys))
        place = sample_index.COLUMNS.get_field_index("phash")
        return table.set_column(
            place, sample_index.COLUMNS.field(place), pa.array(hashes, mask=~decoded)
        )


def _decode_image(
    encoded: bytes | memoryview, config: VerifyConfig
) -> tuple[npt.NDArray[np.uint8] | None, Flaw | None]:
    """The image small and grey, when it can be decoded, and what is wrong with it, if anything."""
    try:
        image = image_decoder.decode_undamaged_image(encoded, config.max_pixels).image
        grey = grey_of(image.convert("RGB"))
    except Exception as error:  # converting meets what decoding passed over
        return None, Flaw(getattr(error, "word", Flaw.UNDECODABLE))
    return grey, Flaw.TOO_SMALL if min(image.size) < config.min_image_px else None


def _why_left_out(seen: _Seen, config: VerifyConfig) -> str | None:
    samples, bad = seen.samples, seen.flaws.total()
    if samples == 0:
        return "it holds no samples"
    if len(seen.named_sources) > 1:
        return f"it mixes the sources {', '.join(sorted(seen.named_sources))}"
    if bad == samples:
        return f"all of its {samples} samples are bad ({_said(seen.flaws)})"
    if seen.job.source is None and bad > samples * config.max_bad_share:
        return f"{bad} of its {samples} samples are bad ({_said(seen.flaws)})"
    return None


def _said(flaws: Counter[str]) -> str:
    return ", ".join(f"{count} {flaw}" for flaw, count in flaws.most_common())


def _why_not_as_recorded(tar: Path, seen: _Seen) -> str | None:
    """The reason why the tar does not hold the samples that were recorded; None if it does.

    A tar without table and statistics was not made by img2dataset, and stands for itself.
    """
    statistics, table = tar.with_name(f"{tar.stem}_stats.json"), tar.with_suffix(".parquet")
    if not statistics.exists() and not table.exists():
        return None
    try:
        stated = json.loads(statistics.read_text())["successes"]
        rows = pq.read_table(table, columns=["key", "status"]).to_pydict()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
        return f"its table or statistics cannot be read ({error})"
    pairs = zip(rows["key"], rows["status"], strict=True)
    successes = {key for key, status in pairs if status == "success"}
    keys = {row["key"] for row in seen.rows}
    if not stated == len(successes) == seen.samples or keys != successes:
        return (
            f"its statistics count {stated} samples, its table {len(successes)}, and the tar holds "
            f"{seen.samples}, {len(keys & successes)} of them the table's"
        )
    return None


def _text_field(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    return None if value in (None, "") else _writable(str(value))


def _writable(text: str) -> str:
    """The text without halves of characters, which no file of text can hold."""
    return text.encode("utf-8", "replace").decode()


def _md5(content: bytes | memoryview) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class VerifyJob(Config):
    config: VerifyConfig
    shards: tuple[ShardJob, ...]


def verify_share(job: VerifyJob, rank: int, ranks: int, say: Callable[[RankState], None]) -> None:
    """Verify every `ranks`-th of the job's shards, and `say` how many are done."""
    for done, shard in enumerate(job.shards[rank::ranks], 1):
        also = ("_stats.json", ".parquet") if shard.source is None else ()  # what downloads leave
        with adopted_shards.on_this_machine(shard.location, shard.target.parent, also) as tar:
            verify_shard(tar, shard, job.config)
        say(RankState(done=done))


if __name__ == "__main__":
    sys.exit(run_share(VerifyJob, verify_share))
