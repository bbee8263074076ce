"""Verify every shard of a download, continuing where a killed run stopped, and index every sample.

Not here: what is checked in a shard (verify_shard.py); what training reads of them (tasks/dataset).
"""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from evaclip_model.errors import InputError, escape_control
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
from tasks.process.child import refuse_full_disk, run_supervised
from tasks.progress import Report
from tasks.verify.config import VerifyConfig
from tasks.verify.verify_shard import ShardJob, VerifyJob, read_verdict

REPORT = "report.json"
TABLES = ".tables"
"""One small table for each verified shard, kept until the index is there."""
LOG = "verify.log"
GRACE_S = 2.0
POLL_S = 0.2


def verify_shards(
    config: VerifyConfig, downloaded: Path, out: Path, processes: int, report: Report
) -> Made:
    """Verify every shard that `downloaded`, the folder of a download or of an adoption, lists
    (`ADOPTED`, or tars as bulk); without a list, `**/shards/*.tar`.

    Each of the `processes` takes about 0.1 GB. That no shard can be trained on, or that one changed
    since it was adopted, is an `InputError`.
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
    found: list[tuple[str, int | None, str | None, str]]
    if (downloaded / ADOPTED).exists():
        shards = read_adopted(downloaded)
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
            path=relative_path(location, out.resolve()),
            target=(out / TABLES / f"{number:06d}.parquet").resolve(),
            source=source,
            name=name,
        )
        for number, (location, size, source, name) in enumerate(found)
    ]


def _refuse_changed(shards: Sequence[AdoptedShard]) -> None:
    found = sizes_and_marks([shard.location for shard in shards])
    pairs = zip(shards, found, strict=True)
    changed = [shard.location for shard, now in pairs if now != (shard.size, shard.mark)]
    if changed:
        raise InputError(
            f"{len(changed):,} of {len(shards):,} adopted shards changed or are gone since they "
            f"were adopted, the first is {changed[0]}: run again to adopt what is there now"
        )


def _verify_missing(
    config: VerifyConfig, listed: Sequence[ShardJob], out: Path, processes: int, report: Report
) -> None:
    folder = out / TABLES
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(".*"):
        torn.unlink()
    missing = tuple(job for job in listed if not job.target.exists())
    left = {job.target for job in missing}

    def poll() -> None:
        left.difference_update([target for target in left if target.exists()])
        report(len(listed) - len(left), len(listed), "shards")

    if not missing:
        return
    job = VerifyJob(config=config, shards=missing, processes=min(processes, len(missing)))
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
        refuse_full_disk(log)
        text = escape_control(log.read_text(errors="replace"))
        said = text.strip().splitlines() or ["it printed nothing"]
        raise RuntimeError(
            f"{len(left)} shards were not verified (status {status}: {said[-1]}); see {log}"
        )


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
