"""Download the images of a merge into shards, once each, whatever interrupts it.

Covers: resuming, running img2dataset in its own process tree, progress, judging the result.
Not here: how a URL is fetched (fetch.py), what a whole shard is (check.py).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from evaclip_model.errors import InputError
from tasks.artifact import Made, write_atomically
from tasks.child import run_supervised
from tasks.download.check import FinishedShard, keep_finished, remove_shard, shard_files
from tasks.download.config import DownloadConfig
from tasks.download.counters import read_counters
from tasks.download.outcome import Outcome
from tasks.download.plan import Plan, expected_bytes, plan_download
from tasks.download.worker import WorkerJob, open_files_needed
from tasks.progress import Report

SHARDS_FOLDER = "shards"
REPORT = "report.json"
LOG = "download.log"
IDLE_STARTS = 2
"""After so many starts in a row that finished no shard, img2dataset is not started again."""
STALL_S = 300.0
"""Time past deadline_s without a single URL done, after which img2dataset is started again."""
GRACE_S = 2.0
ABORT_AFTER_URLS = 2_000
"""URLs, already shuffled over the web, after which the success rate is known to about 2 %."""


def download_images(
    config: DownloadConfig,
    merged: Path,
    out: Path,
    processes: int,
    threads: int,
    report: Report,
) -> Made:
    """Make `out/shards` from every row of `merged/<source>/*.parquet`.

    Args:
        processes: downloading processes; about 0.8 GB of memory each.
        threads: connections open at once in each process.

    Raises:
        InputError: unusable input, too little disk or too few open files, or fewer successes than
            min_success_rate; the shards that did well are kept.
        RuntimeError: img2dataset, started again and again, finished none of the missing shards.
    """
    plan = plan_download(merged, config)
    shards, work = out / SHARDS_FOLDER, out / ".work"
    _claim(out, plan)
    shards.mkdir(exist_ok=True)
    finished, problems = keep_finished(shards, plan.shards)
    idle_starts = 0
    while len(finished) < len(plan.shards) and idle_starts < IDLE_STARTS:
        rows_left = plan.rows - sum(shard.planned.rows for shard in finished)
        _preflight(out, rows_left, config, threads)
        job = _prepare(work, shards, plan, config, processes, threads)
        with suppress(_LostWorker):
            _run(job, work, out / LOG, rows_done=plan.rows - rows_left, plan=plan, report=report)
        before, (finished, problems) = len(finished), keep_finished(shards, plan.shards)
        idle_starts = 0 if len(finished) > before else idle_starts + 1
    shutil.rmtree(work, ignore_errors=True)
    if len(finished) < len(plan.shards):
        raise _not_finished(out, problems)
    _judge(config, shards, finished)
    made = _describe(out, shards, finished)
    report(plan.rows, plan.rows, f"{made.counts['samples']:,} images")
    return made


def _claim(out: Path, plan: Plan) -> None:
    """Mark `out` as belonging to this plan.

    Raises:
        InputError: it belongs to another. Other options on resume would duplicate rows silently.
    """
    if any(character in str(out.resolve()) for character in "*?["):
        raise InputError(f"{out}: img2dataset cannot write below a folder with *, ? or [ in it")
    mark = out / "fingerprint"
    if not mark.exists():
        write_atomically(mark, plan.fingerprint)
    elif mark.read_text() != plan.fingerprint:
        raise InputError(
            f"{out} was begun from other rows or with other options: delete it and run again"
        )


def _preflight(out: Path, rows: int, config: DownloadConfig, threads: int) -> None:
    """Refuse what would fail hours later.

    Raises:
        InputError: too little disk, or too few open files.
    """
    needed, free = expected_bytes(rows, config.image_px), shutil.disk_usage(out).free
    if free < needed:
        raise InputError(
            f"{rows:,} images at {config.image_px} px need about {needed / 1e9:.2f} GB, but "
            f"{out} has {free / 1e9:.2f} GB free: free some space or use another disk"
        )
    files, limit = open_files_needed(threads), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit != resource.RLIM_INFINITY and limit < files:
        raise InputError(
            f"{threads} threads need {files} open files, but the system allows {limit}: "
            "raise 'ulimit -n' or use fewer download threads"
        )


def _prepare(
    work: Path,
    shards: Path,
    plan: Plan,
    config: DownloadConfig,
    processes: int,
    threads: int,
) -> WorkerJob:
    """Lay out the inputs of one call: links whose order by name is the plan's order."""
    shutil.rmtree(work, ignore_errors=True)
    inputs, counters = work / "inputs", work / "counters"
    inputs.mkdir(parents=True)
    counters.mkdir()
    for number, file in enumerate(plan.files):
        (inputs / f"{number:06d}.parquet").symlink_to(file.resolve())
    return WorkerJob(
        config=config,
        inputs=inputs.resolve(),
        output=shards.resolve(),
        counters=counters.resolve(),
        extra_columns=plan.extra_columns,
        processes=processes,
        threads=threads,
    )


def _run(
    job: WorkerJob, work: Path, log: Path, *, rows_done: int, plan: Plan, report: Report
) -> None:
    """Run img2dataset to its end, reporting URLs as they are done.

    Raises:
        _LostWorker: one of its processes was killed, or nothing moves any more.
        InputError: almost nothing can be fetched.
    """
    path = work / "job.json"
    write_atomically(path, job.model_dump_json(indent=1))
    began = moved = time.monotonic()
    tried = 0

    def poll() -> None:
        nonlocal moved, tried
        progress, now = read_counters(job.counters), time.monotonic()
        counts = progress.counts
        if counts.total() != tried:
            moved, tried = now, counts.total()
        # its pool never hears of a killed process and would wait for that shard for ever
        if not all(map(_is_alive, progress.busy)) or now - moved > job.config.deadline_s + STALL_S:
            raise _LostWorker
        fetched, per_s = counts[Outcome.SUCCESS], tried / (now - began)
        done = min(rows_done + tried, plan.rows)
        report(done, plan.rows, f"{fetched:,} fetched, {tried - fetched:,} failed, {per_s:.0f}/s")
        # a dead network would mark every shard as done; half the accepted rate is beyond doubt
        if tried >= ABORT_AFTER_URLS and fetched < tried * job.config.min_success_rate / 2:
            raise _too_few(job.config, counts, tried)

    run_supervised(
        [sys.executable, "-m", "tasks.download.worker", str(path)],
        log=log,
        grace_s=GRACE_S,
        env=_environment(job.config),
        poll=poll,
    )


class _LostWorker(Exception):
    """A downloading process is gone, so that img2dataset would not end by itself."""


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _environment(config: DownloadConfig) -> dict[str, str]:
    """The worker's: nothing that phones home, one CPU thread a process, bounded decoding."""
    return {
        **os.environ,
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "WANDB_MODE": "disabled",
        "DO_NOT_TRACK": "1",
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(config.max_pixels),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _not_finished(out: Path, problems: Sequence[str]) -> Exception:
    """Why img2dataset left shards undone; it only prints what stopped it."""
    log = out / LOG
    if os.strerror(errno.ENOSPC) in log.read_text(errors="replace")[-100_000:]:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
    return RuntimeError(
        f"{len(problems)} shards were not finished by {IDLE_STARTS} starts in a row; "
        f"the first: {problems[0]}; see {log}"
    )


def _judge(config: DownloadConfig, shards: Path, finished: Sequence[FinishedShard]) -> None:
    """Refuse a systematic failure, and forget the shards that it spoiled so that they are redone.

    Raises:
        InputError: fewer rows than min_success_rate became samples.
    """
    outcomes = _sum(finished)
    rows = outcomes.total()
    if outcomes[Outcome.SUCCESS] >= rows * config.min_success_rate:
        return
    for shard in finished:
        if shard.success_rate < config.min_success_rate:
            remove_shard(shards, shard.planned)
    raise _too_few(config, outcomes, rows)


def _too_few(config: DownloadConfig, outcomes: Counter[Outcome], rows: int) -> InputError:
    reasons = ", ".join(
        f"{number:,} {reason.value}"
        for reason, number in outcomes.most_common()
        if reason is not Outcome.SUCCESS and number
    )
    return InputError(
        f"only {outcomes[Outcome.SUCCESS]:,} of {rows:,} URLs gave an image, less than "
        f"min_success_rate = {config.min_success_rate:g} ({reasons}): mend the cause (network, "
        "DNS, server, limits) and run the same command again"
    )


def _sum(shards: Sequence[FinishedShard]) -> Counter[Outcome]:
    return sum((shard.outcomes for shard in shards), Counter[Outcome]())


def _describe(out: Path, shards: Path, finished: Sequence[FinishedShard]) -> Made:
    """Write the report and name the artifact's files."""
    by_source: dict[str, Counter[Outcome]] = {}
    for shard in finished:
        by_source[shard.planned.source] = (
            by_source.get(shard.planned.source, Counter()) + shard.outcomes
        )
    total = _sum(finished)
    counts: dict[str, int | float] = {
        "rows": total.total(),
        "samples": total[Outcome.SUCCESS],
        "shards": len(finished),
        "bytes": sum(shard.tar_bytes for shard in finished),
    }
    for reason in sorted(set(total) - {Outcome.SUCCESS}):
        counts[f"failed.{reason.value}"] = total[reason]
    for source, outcomes in sorted(by_source.items()):
        counts[f"{source}.rows"] = outcomes.total()
        counts[f"{source}.samples"] = outcomes[Outcome.SUCCESS]
    details = {
        source: {"rows": outcomes.total()}
        | {outcome.value: outcomes[outcome] for outcome in Outcome if outcomes[outcome]}
        for source, outcomes in sorted(by_source.items())
    }
    write_atomically(out / REPORT, json.dumps({"sources": details, **counts}, indent=1) + "\n")
    files = [path for shard in finished for path in shard_files(shards, shard.planned)]
    return Made(counts, (*files, out / REPORT))
