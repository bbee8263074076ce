"""Verify every shard of a download, and index every sample in them.

Covers: going through all shards, continuing where a killed run stopped, verdicts, index, report.
Not here: what is checked in a shard (verify_shard.py); what training reads of them (tasks/dataset).
"""

import errno
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from tasks.artifacts.artifact import Made, read_bulk
from tasks.index.adopted_shards import ADOPTED, AdoptedShard, read_adopted, sizes_and_marks
from tasks.index.sample_index import (
    CHECKED,
    INDEX,
    ShardVerdict,
    read_verdicts,
    relative_path,
    write_index,
    write_verdicts,
)
from tasks.process.child import run_supervised
from tasks.progress import Report
from tasks.verify.config import VerifyConfig
from tasks.verify.verify_shard import Adopted, ShardJob, VerifyJob, read_verdict

REPORT = "report.json"
TABLES = ".tables"
"""One small table for each verified shard, kept until the index is there."""
LOG = "verify.log"
GRACE_S = 2.0
POLL_S = 0.2


def verify_shards(
    config: VerifyConfig, downloaded: Path, out: Path, processes: int, report: Report
) -> Made:
    """Verify every shard that `downloaded` lists (`ADOPTED`, or tars as bulk); without a list,
    `**/shards/*.tar`.

    Args:
        downloaded: folder of a download or of an adoption.
        processes: shards verified at the same time; each takes about 0.1 GB.

    Raises:
        InputError: there is no shard that can be trained on, or one changed since it was adopted.
    """
    if not (out / CHECKED).exists():
        _verify_all(config, downloaded, out, processes, report)
    shutil.rmtree(out / TABLES, ignore_errors=True)
    index = sorted((out / INDEX).rglob("*.parquet"))
    return Made(_count_verdicts(read_verdicts(out)), (out / CHECKED, out / REPORT, *index))


def _verify_all(
    config: VerifyConfig, downloaded: Path, out: Path, processes: int, report: Report
) -> None:
    """Write everything, the verdicts last."""
    listed = _list_jobs(downloaded, out)
    if not listed:
        raise InputError(f"{downloaded} holds no shards: download again")
    tables = [job.target for job in listed]
    _verify_missing(config, listed, out, processes, report)
    verdicts = [read_verdict(table) for table in tables]
    if not any(verdict.shard for verdict in verdicts):
        raise InputError(
            f"none of the {len(listed)} shards of {downloaded} can be trained on; "
            f"{verdicts[0].path}: {verdicts[0].left_out}"
        )
    report(len(listed), len(listed), "indexing")
    write_index(tables, out / INDEX, config.memory_limit)
    left_out = {verdict.path: verdict.left_out for verdict in verdicts if verdict.left_out}
    details = {**_count_verdicts(verdicts), "left_out": left_out}
    write_atomically(out / REPORT, json.dumps(details, indent=1) + "\n")
    write_verdicts(verdicts, out)


def _list_jobs(downloaded: Path, out: Path) -> list[ShardJob]:
    """The shards, in the order of their names, or in that of the adoption's list.

    A shard that the download's list names and the folder lacks is among them, so that it is missed.
    """
    found: list[tuple[str, int | None, Adopted | None]]
    if (downloaded / ADOPTED).exists():
        shards = read_adopted(downloaded)
        _refuse_changed(shards)
        found = [(s.location, s.size, Adopted(source=s.source, name=s.name)) for s in shards]
    else:
        listed = read_bulk(downloaded)
        sizes: dict[Path, int | None] = {**listed} if listed is not None else {}
        if listed is None:  # before there were lists, or packed by hand
            sizes = dict.fromkeys(downloaded.glob("**/shards/*.tar"))
        tars = sorted(path for path in sizes if path.suffix == ".tar")
        found = [(str(tar.resolve()), sizes[tar], None) for tar in tars]
    return [
        ShardJob(
            location=location,
            size=size,
            path=relative_path(location, out.resolve()),
            target=(out / TABLES / f"{number:06d}.parquet").resolve(),
            adopted=adopted,
        )
        for number, (location, size, adopted) in enumerate(found)
    ]


def _refuse_changed(shards: Sequence[AdoptedShard]) -> None:
    """Raises: InputError: a shard is not the one any more that was adopted."""
    found = sizes_and_marks([shard.location for shard in shards])
    changed = [
        shard.location
        for shard, now in zip(shards, found, strict=True)
        if now != (shard.size, shard.mark)
    ]
    if changed:
        raise InputError(
            f"{len(changed):,} of {len(shards):,} adopted shards changed or are gone since they "
            f"were adopted, the first is {changed[0]}: run again to adopt what is there now"
        )


def _verify_missing(
    config: VerifyConfig, listed: Sequence[ShardJob], out: Path, processes: int, report: Report
) -> None:
    """Make the table of every shard that has none yet."""
    folder = out / TABLES
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(".*"):
        torn.unlink()
    missing = [job for job in listed if not job.target.exists()]
    before = len(listed) - len(missing)
    left = {job.target for job in missing}

    def poll() -> None:
        left.difference_update([target for target in left if target.exists()])
        report(before + len(missing) - len(left), len(listed), "shards")

    if not missing:
        return
    job = VerifyJob(config=config, shards=tuple(missing), processes=min(processes, len(missing)))
    path, log = out / "job.json", out / LOG
    write_atomically(path, job.model_dump_json())
    status = run_supervised(
        [sys.executable, "-m", "tasks.verify.verify_shard", str(path)],
        log=log,
        grace_s=GRACE_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        poll=poll,
        poll_s=POLL_S,
    )
    poll()
    if left:
        raise _not_finished(status, len(left), log)


def _not_finished(status: int, shards: int, log: Path) -> Exception:
    """The error for a worker that left shards undone."""
    said = log.read_text(errors="replace")[-100_000:]
    if os.strerror(errno.ENOSPC) in said:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(log.parent))
    last = (said.strip().splitlines() or ["it printed nothing"])[-1]
    return RuntimeError(f"{shards} shards were not verified (status {status}: {last}); see {log}")


def _count_verdicts(verdicts: Sequence[ShardVerdict]) -> dict[str, int | float]:
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
