"""Download the images of a merge into shards, once each, whatever interrupts it. Not here: how a
URL is fetched (fetch.py), what a whole shard is, which rows another pass tries (shards.py),
when to stop early (watch_progress.py).

    out/shards            the first pass: every row
    out/pass-N/rows       rows whose failure may pass, from the pass before
    out/pass-N/shards     their shards, numbered on: keys are unique over all passes
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.reading.samples import BrokenShard
from tasks.artifacts.artifact import Made
from tasks.artifacts.root_store import Outbox
from tasks.download.config import Crew, DownloadConfig, require_distributor
from tasks.download.download_worker import WorkerJob, open_files_needed
from tasks.download.fetch_outcome import Outcome
from tasks.download.shards import (
    CAPTION_COLUMN,
    URL_COLUMN,
    FinishedShard,
    Ledger,
    Plan,
    PlannedShard,
    expected_bytes,
    plan_download,
    remove_shard,
    rows_to_retry,
    shard_files,
    silent_hosts,
    sum_of,
    total_outcomes,
    verdict_file,
    write_rows_to_retry,
)
from tasks.download.watch_progress import CounterReader, Watch, dead_links, network_trouble
from tasks.process.child import refuse_full_disk, run_supervised
from tasks.progress import Report

SHARDS_FOLDER = "shards"
WORK_FOLDER = ".work"
REPORT = "report.json"
LOG = "download.log"
PROGRESS = "progress.jsonl"
"""Speed and success while it ran, for tracking; no part of the artifact."""
NOTE_EVERY_S = 10.0
IDLE_STARTS = 2
"""After so many starts in a row that finished no shard, img2dataset is not started again."""
STALL_S = 300.0
"""Time past deadline_s without a single URL done, after which img2dataset is started again."""
GRACE_S = 2.0
ASK_WITNESSES_EVERY_S = 60.0
"""How often a later pass, most of whose URLs stay silent, makes sure that the network is there."""
SPOILED_ROWS = 50
"""Rows of a shard that are enough to tell a dead network from a few dead hosts."""
WORKER_ENVIRONMENT = {
    "PYSPARK_PYTHON": sys.executable,
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "WANDB_MODE": "disabled",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
"""Nothing that phones home, one CPU thread a process."""


def download_images(
    config: DownloadConfig, merged: Path, out: Path, crew: Crew, report: Report
) -> Made:
    """Make shards under `out` from every row of `merged/<source>/*.parquet`; whatever stops it, the
    shards that did well are kept."""
    require_distributor(crew.distributor)
    plan = plan_download(merged, config)
    order = _Order(out, config, crew, report, Outbox(out))
    first = last = _Pass(1, order, plan, rows_before=0)
    done = [first.complete_shards()]
    _judge_success(config, first, done[0])
    columns = (*plan.extra_columns, CAPTION_COLUMN, URL_COLUMN)
    for number in range(2, config.passes + 1):
        if not rows_to_retry(done[-1]):
            break
        folder = _pass_folder(out, number)
        rows = folder / "rows"
        if not rows.exists():
            asked_s = max(shard.retry_after_s for shard in done[-1])
            _wait_before_pass(min(config.politeness.pass_wait_s, asked_s), plan.rows, report)
            folder.mkdir(exist_ok=True)
            write_rows_to_retry(done[-1], last.shards, columns, rows, config.samples_per_shard)
        again = plan_download(rows, config, last.plan.shards[-1].number + 1)
        rows_before = sum(shard.planned.rows for finished in done for shard in finished)
        last = _Pass(number, order, again, rows_before, first)
        done.append(last.complete_shards())
    made = _describe_made(out, plan, done)
    report(plan.rows, plan.rows, f"{made.counts['samples']:,} images")
    return made


class _Order(NamedTuple):
    """The common part of all passes of one download."""

    out: Path
    config: DownloadConfig
    crew: Crew
    report: Report
    outbox: Outbox
    """Of a root at a URL, where finished tars go at once."""


class _Pass:
    """One pass over rows: its folder, what it shall hold, and making it so."""

    def __init__(
        self, number: int, order: _Order, plan: Plan, rows_before: int, first: _Pass | None = None
    ) -> None:
        folder = _pass_folder(order.out, number)
        _claim_folder(folder, plan)
        self.number = number
        self.plan = plan
        self.shards = folder / SHARDS_FOLDER
        self.shards.mkdir(exist_ok=True)
        self._order = order
        self._rows_before = rows_before
        self._first = first
        self._folder = folder
        self._ledger = Ledger(folder / "checked.jsonl", self.shards, order.outbox)
        self._finished: list[FinishedShard] = []
        self._problems: list[str] = []
        self._check_shards()

    @property
    def is_finished(self) -> bool:
        return len(self._finished) == len(self.plan.shards)

    def complete_shards(self) -> list[FinishedShard]:
        """Download until every shard is whole; return them."""
        if not self.is_finished:  # later passes were made from others
            for folder in self._order.out.glob("pass-*"):
                if int(folder.name.removeprefix("pass-")) > self.number:
                    shutil.rmtree(folder)
        self._remove_unfinished()
        idle_starts = 0
        while not self.is_finished and idle_starts < IDLE_STARTS:
            whole_before = {shard.planned for shard in self._finished}
            rows_left = self.plan.rows - sum(shard.planned.rows for shard in self._finished)
            _check_before_start(self._folder, rows_left, self._order)
            try:
                with suppress(_LostWorker):
                    self._run_img2dataset(_lay_out_inputs(self._folder, self.plan, self._order))
            finally:
                self._order.outbox.wait_for_all()
                self._check_shards()
                lost = self._forget_shards_without_network(whole_before)
            self._remove_unfinished()
            if lost is not None:
                raise InputError(lost)
            idle_starts = 0 if len(self._finished) > len(whole_before) else idle_starts + 1
        shutil.rmtree(self._folder / WORK_FOLDER, ignore_errors=True)
        if not self.is_finished:
            log = self._folder / LOG
            refuse_full_disk(log)  # img2dataset only prints what stopped it
            raise RuntimeError(
                f"{len(self._problems)} shards were not finished by {IDLE_STARTS} starts in a row; "
                f"the first: {self._problems[0]}; see {log}"
            )
        return self._finished

    def _check_shards(self) -> None:
        self._finished, self._problems = [], []
        for planned in self.plan.shards:
            try:
                self._finished.append(self._ledger.check_planned(planned))
            except BrokenShard as problem:
                self._problems.append(str(problem))

    def _remove_unfinished(self) -> None:
        wanted = {
            path for shard in self._finished for path in shard_files(self.shards, shard.planned)
        }
        for path in self.shards.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in wanted:
                path.unlink()

    def _forget_shards_without_network(self, whole_before: Set[PlannedShard]) -> str | None:
        """Remove shards in which nearly no host answered, and say so; None if there are none.

        The network may have gone in the last moments of a run, too short for it to be stopped. In a
        later pass, where silent hosts are nothing special, only shards of this run are in question,
        and only if hosts that answered before are silent too.
        """
        lost = [
            shard
            for shard in self._finished
            if network_trouble(shard.outcomes)
            and (shard.planned not in whole_before or not self._first)
            and (shard.planned.rows >= SPOILED_ROWS or self._first)
        ]
        problem = self._network_down(sum_of(lost)) if lost else None
        if problem is not None:
            for shard in lost:
                remove_shard(self.shards, shard.planned)
            self._check_shards()
        return problem

    def _network_down(self, counts: Counter[Outcome]) -> str | None:
        """The sentence for `counts` of URLs that nearly all stayed silent; in a later pass, whose
        rows failed before, None if hosts of the first, which did well, answer."""
        silent = None
        if first := self._first:
            silent = silent_hosts(first._finished, first.shards, self._order.config)
        return None if silent == 0 else network_trouble(counts, silent)

    def _run_img2dataset(self, job: WorkerJob) -> None:
        """Run img2dataset to its end, reporting URLs as they are done; `_LostWorker` if one of its
        processes was killed, or nothing moves any more."""
        path = self._folder / WORK_FOLDER / "job.json"
        write_atomically(path, job.model_dump_json(indent=1))
        reader, moved, tried = CounterReader(job.counters), time.monotonic(), 0
        rows_done = sum(shard.planned.rows for shard in self._finished)
        watch = Watch(rows_done, self.plan.rows, job.config.min_success_rate)
        stall_s, noted = job.config.deadline_s + STALL_S, time.monotonic()
        asked = float("-inf")

        def poll() -> None:
            nonlocal moved, tried, noted, asked
            progress, now = reader.read_counts(), time.monotonic()
            if progress.counts.total() != tried:
                moved, tried = now, progress.counts.total()
            for number in reader.take_finished():
                self._ledger.take_verdict(verdict_file(job.counters, number))
                planned, outbox = self.plan.shards[number - job.first_number], self._order.outbox
                with suppress(BrokenShard):  # it will be found again when all is looked at
                    if outbox.copy is not None and self._ledger.check_planned(planned):
                        outbox.move_files(shard_files(self.shards, planned)[:1])
            watch.take_progress(now, progress)
            prefix = f"pass {self.number}: " if self.number > 1 else ""
            self._order.report(watch.rows_done, self.plan.rows, prefix + watch.progress_line())
            if now - noted > NOTE_EVERY_S:
                noted = now
                self._log_figures(watch)
            # its pool never hears of a killed process and would wait for that shard for ever
            is_here, busy = job.crew.distributor == "multiprocessing", progress.busy
            if (is_here and not all(map(psutil.pid_exists, busy))) or now - moved > stall_s:
                raise _LostWorker
            problem = watch.network_down()
            if self._first is None:
                problem = problem or watch.list_dead()
            elif problem and now - asked > ASK_WITNESSES_EVERY_S:
                asked, problem = now, self._network_down(progress.counts)
            else:
                problem = None
            if problem:
                raise InputError(problem)

        run_supervised(
            [sys.executable, "-m", "tasks.download.download_worker", str(path)],
            log=self._folder / LOG,
            grace_s=GRACE_S,
            env={**os.environ, **WORKER_ENVIRONMENT},
            poll=poll,
        )

    def _log_figures(self, watch: Watch) -> None:
        """Add the figures of now to the file that tracking follows; steps are rows tried."""
        step = self._rows_before + watch.rows_done
        line = {"step": step, "time": time.time(), **watch.progress_figures()}
        with (self._order.out / PROGRESS).open("a") as file:
            file.write(json.dumps(line) + "\n")


class _LostWorker(Exception):
    """A downloading process is gone, so that img2dataset would not end by itself."""


def _pass_folder(out: Path, number: int) -> Path:
    return out if number == 1 else out / f"pass-{number}"


def _wait_before_pass(seconds: float, rows: int, report: Report) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        report(rows, rows, f"waiting {left:.0f} s, as servers asked, before trying again")
        time.sleep(min(left, 1.0))


def _claim_folder(out: Path, plan: Plan) -> None:
    """Mark `out` as this plan's; other options on resume would duplicate rows silently."""
    if any(character in str(out.resolve()) for character in "*?["):
        raise InputError(f"{out}: img2dataset cannot write below a folder with *, ? or [ in it")
    mark = out / "fingerprint"
    if not mark.exists():
        write_atomically(mark, plan.fingerprint)
    elif mark.read_text() != plan.fingerprint:
        raise InputError(
            f"{out} was begun from other rows or with other options: delete it and run again"
        )


def _check_before_start(out: Path, rows: int, order: _Order) -> None:
    """Refuse what would fail hours later: too little disk, or too few open files."""
    image_px, threads = order.config.image_px, order.crew.threads
    needed, free = expected_bytes(rows, image_px), shutil.disk_usage(out).free
    if free < needed and order.outbox.copy is None:
        raise InputError(
            f"{rows:,} images at {image_px} px need about {needed / 1e9:.2f} GB, but "
            f"{out} has {free / 1e9:.2f} GB free: free some space or use another disk"
        )
    files, limit = open_files_needed(threads), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit != resource.RLIM_INFINITY and limit < files:
        raise InputError(
            f"{threads} threads need {files} open files, but the system allows {limit}: "
            "raise 'ulimit -n' or use fewer download threads"
        )


def _lay_out_inputs(folder: Path, plan: Plan, order: _Order) -> WorkerJob:
    """Lay out the inputs of one call: links whose order by name is the plan's order."""
    work = (folder / WORK_FOLDER).resolve()
    shutil.rmtree(work, ignore_errors=True)
    for name in ("inputs", "counters"):
        (work / name).mkdir(parents=True)
    for number, file in enumerate(plan.files):
        (work / "inputs" / f"{number:06d}.parquet").symlink_to(file.resolve())
    return WorkerJob(
        config=order.config,
        crew=order.crew,
        inputs=work / "inputs",
        output=(folder / SHARDS_FOLDER).resolve(),
        counters=work / "counters",
        extra_columns=plan.extra_columns,
        first_number=plan.shards[0].number,
    )


def _judge_success(config: DownloadConfig, first: _Pass, finished: Sequence[FinishedShard]) -> None:
    """Refuse a systematic failure, and forget the shards that it spoiled: they are redone."""
    outcomes = sum_of(finished)
    if outcomes[Outcome.SUCCESS] >= outcomes.total() * config.min_success_rate:
        return
    for shard in finished:
        if shard.success_rate < config.min_success_rate:
            remove_shard(first.shards, shard.planned)
    raise InputError(network_trouble(outcomes) or dead_links(outcomes, config.min_success_rate))


def _describe_made(out: Path, plan: Plan, done: Sequence[Sequence[FinishedShard]]) -> Made:
    by_source = total_outcomes(done)
    total = sum(by_source.values(), Counter[Outcome]())
    if total.total() != plan.rows:
        raise RuntimeError(
            f"{plan.rows:,} rows were to be tried, {total.total():,} are accounted for"
        )
    counts: dict[str, int | float] = {
        "rows": plan.rows,
        "samples": total[Outcome.SUCCESS],
        "shards": sum(map(len, done)),
        "bytes": sum(shard.tar_bytes for finished in done for shard in finished),
    }
    for number, finished in enumerate(done[1:], start=2):
        counts[f"pass{number}.rows"] = sum(shard.planned.rows for shard in finished)
        counts[f"pass{number}.samples"] = sum(s.outcomes[Outcome.SUCCESS] for s in finished)
    for reason in sorted(set(total) - {Outcome.SUCCESS}):
        counts[f"failed.{reason.value}"] = total[reason]
    details = {}
    for source, outcomes in sorted(by_source.items()):
        counts[f"{source}.rows"] = outcomes.total()
        counts[f"{source}.samples"] = outcomes[Outcome.SUCCESS]
        ended = {outcome.value: outcomes[outcome] for outcome in Outcome if outcomes[outcome]}
        details[source] = {"rows": outcomes.total(), **ended}
    write_atomically(out / REPORT, json.dumps({"sources": details, **counts}, indent=1) + "\n")
    shards = tuple(
        path
        for number, finished in enumerate(done, start=1)
        for shard in finished
        for path in shard_files(_pass_folder(out, number) / SHARDS_FOLDER, shard.planned)
    )
    return Made(counts, (out / REPORT,), bulk=shards)
