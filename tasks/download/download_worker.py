"""The process that downloads: `python -m tasks.download.download_worker JOB_JSON`, one call of
img2dataset over all files of a job, with the hardened downloader.

img2dataset exits with 0 whatever happened, so that shards.py has to find out; it also
installs signal handlers and orphans its pool when it is killed, so that it is a process of its own,
under tasks/process/supervise.py. The main guard is needed: its processes import this module again.
"""

import importlib
import json
import multiprocessing
import resource
import sys
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from resource import RLIMIT_NOFILE
from types import SimpleNamespace
from typing import Any

from evaclip_model.config import Config
from tasks.download.config import Crew, DownloadConfig
from tasks.download.shards import CAPTION_COLUMN, SHARD_DIGITS, URL_COLUMN
from tasks.spark_session import spark_builder

FILES_PER_THREAD = 3
OTHER_FILES = 256


class WorkerJob(Config):
    """One call of img2dataset."""

    config: DownloadConfig
    crew: Crew
    inputs: Path
    """Folder of parquet files; shards are numbered in the order of their names."""
    output: Path
    """Folder that the shards go to; numbers that are there already are left alone."""
    counters: Path
    extra_columns: tuple[str, ...]
    first_number: int
    """Of the first shard."""


def open_files_needed(threads: int) -> int:
    """Open files a downloading process may need: sockets, DNS sockets, and its own."""
    return FILES_PER_THREAD * threads + OTHER_FILES


def run_download(job: WorkerJob) -> None:
    config, crew = job.config, job.crew
    wanted, (soft, hard) = open_files_needed(crew.threads), resource.getrlimit(RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(RLIMIT_NOFILE, (wanted, hard))
    _adapted_img2dataset(job).download(
        url_list=str(job.inputs),
        input_format="parquet",
        url_col=URL_COLUMN,
        caption_col=CAPTION_COLUMN,
        save_additional_columns=list(job.extra_columns),
        output_folder=str(job.output),
        output_format="webdataset",
        processes_count=crew.processes,
        thread_count=crew.threads,
        distributor=crew.distributor,
        image_size=config.image_px,
        **config.storage.model_dump(),  # its fields have img2dataset's names
        number_sample_per_shard=config.samples_per_shard,
        oom_shard_count=SHARD_DIGITS,
        compute_hash="sha256",
        extract_exif=False,
        min_image_size=config.min_image_px,
        max_image_area=config.max_pixels,
        max_aspect_ratio=config.max_aspect_ratio,
        enable_wandb=False,
        incremental_mode="incremental",
    )


def _adapted_img2dataset(job: WorkerJob) -> Any:
    """img2dataset's main module, with our downloader, our numbers and cheaper processes."""
    if job.crew.distributor == "multiprocessing":
        _share_imports()
    from tasks.download.img2dataset_adapter import HardenedDownloader

    # `import img2dataset.main` would give the function of that name, and patch nothing
    main: Any = importlib.import_module("img2dataset.main")
    main.Downloader = partial(HardenedDownloader, config=job.config, counters=job.counters)
    # a process that would print the same counts as our counters
    main.LoggerProcess = lambda *_: SimpleNamespace(start=_pass, join=_pass, terminate=_pass)
    reader = main.Reader  # its last option is the number of the first shard
    main.Reader = lambda *options: reader(*options[:-1], job.first_number)
    if job.crew.distributor == "pyspark":
        # The session that img2dataset then finds; its own would take 16 GB for the driver.
        spark_builder("evaclip download", job.crew.processes).getOrCreate()
    return main


def _pass() -> None: ...


def _share_imports() -> None:
    """Fork downloading processes from one that has imported everything, at once and in its memory;
    img2dataset's own spawning imports for 5 s and 0.8 GB in each of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tasks.download.img2dataset_adapter"])
    forkserver.ensure_running()
    distributor: Any = importlib.import_module("img2dataset.distributor")
    distributor.get_context = lambda method: context


if __name__ == "__main__":
    path = Path(sys.argv[1])
    run_download(WorkerJob.from_mapping(json.loads(path.read_text()), where=str(path)))
