"""The process that downloads: `python -m tasks.download.worker JOB_JSON`

Covers: one call of img2dataset over all files of a job, with the hardened downloader.
Not here: whether the result is right. img2dataset exits with 0 whatever happened, so that is for
check.py to find out; it also installs signal handlers and orphans its pool when it is killed,
which is why it is a process of its own, under tasks/supervise.py. The main guard below is needed:
its processes import this module again.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import resource
import sys
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from evaclip_model.config import Config
from tasks.download.config import DownloadConfig
from tasks.download.plan import CAPTION_COLUMN, SHARD_DIGITS, URL_COLUMN

FILES_PER_THREAD = 3
OTHER_FILES = 256


class WorkerJob(Config):
    """One call of img2dataset."""

    config: DownloadConfig
    inputs: Path
    """Folder of parquet files; shards are numbered in the order of their names."""
    output: Path
    """Folder that the shards go to; numbers that are there already are left alone."""
    counters: Path
    """Folder for tasks/download/counters.py."""
    extra_columns: tuple[str, ...]
    """Columns besides url and caption to keep with every sample."""
    processes: int
    """Downloading processes, each with its own shard."""
    threads: int
    """Connections open at once in each process."""


def open_files_needed(threads: int) -> int:
    """Open files a downloading process may need: sockets, DNS sockets, and its own."""
    return FILES_PER_THREAD * threads + OTHER_FILES


def run(job: WorkerJob) -> None:
    """Download everything in `job` that is not there yet."""
    _raise_open_files(open_files_needed(job.threads))
    config = job.config
    main = _adapted_img2dataset(job)
    main.download(
        url_list=str(job.inputs),
        input_format="parquet",
        url_col=URL_COLUMN,
        caption_col=CAPTION_COLUMN,
        save_additional_columns=list(job.extra_columns),
        output_folder=str(job.output),
        output_format="webdataset",
        processes_count=job.processes,
        thread_count=job.threads,
        timeout=config.timeout_s,
        retries=config.retries,
        image_size=config.image_px,
        resize_mode=config.resize_mode,
        resize_only_if_bigger=config.resize_only_if_bigger,
        encode_format=config.encode_format,
        encode_quality=config.encode_quality,
        skip_reencode=config.skip_reencode,
        number_sample_per_shard=config.samples_per_shard,
        oom_shard_count=SHARD_DIGITS,
        compute_hash="sha256",
        extract_exif=False,
        min_image_size=config.min_image_px,
        max_image_area=config.max_pixels,
        max_aspect_ratio=config.max_aspect_ratio,
        user_agent_token=config.user_agent_token,
        disallowed_header_directives=list(config.disallowed_directives),
        enable_wandb=False,
        incremental_mode="incremental",
    )


def _adapted_img2dataset(job: WorkerJob) -> Any:
    """img2dataset's main module, with our downloader and a cheaper way to start processes."""
    # The fork server imports while this process does. Processes forked from it start at once and
    # share its memory; img2dataset's own spawning imports for 5 s and 0.8 GB in each of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tasks.download.hardened"])
    forkserver.ensure_running()

    from tasks.download.fetch import Limits
    from tasks.download.hardened import HardenedDownloader

    # `import img2dataset.main` would give the function of that name, and patch nothing
    main: Any = importlib.import_module("img2dataset.main")
    distributor: Any = importlib.import_module("img2dataset.distributor")
    main.Downloader = partial(
        HardenedDownloader, limits=Limits.of(job.config), counters=job.counters
    )
    main.LoggerProcess = _NoLogger
    distributor.get_context = lambda method: context
    return main


class _NoLogger:
    """In place of a process that prints the same counts: ours are read from the counters."""

    def __init__(self, *_: object) -> None:
        self.done_shards: set[int] = set()

    def start(self) -> None: ...

    def join(self) -> None: ...

    def terminate(self) -> None: ...


def _raise_open_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    path = Path(sys.argv[1])
    run(WorkerJob.from_mapping(json.loads(path.read_text()), where=str(path)))
