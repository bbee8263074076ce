"""The process that downloads: `python -m tasks.download.download_worker JOB_JSON`

Covers: one call of img2dataset over all files of a job, with the hardened downloader.
Not here: whether the result is right. img2dataset exits with 0 whatever happened, so that is for
check_shards.py to find out; it also installs signal handlers and orphans its pool when it is
killed, which is why it is a process of its own, under tasks/process/supervise.py. The main guard
below is needed: its processes import this module again.
"""

import importlib
import json
import multiprocessing
import resource
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from evaclip_model.config import Config
from tasks.download.config import Distributor, DownloadConfig
from tasks.download.url_tables import CAPTION_COLUMN, SHARD_DIGITS, URL_COLUMN
from tasks.spark_session import spark_builder

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
    """Folder for tasks/download/watch_progress.py."""
    extra_columns: tuple[str, ...]
    """Columns besides url and caption to keep with every sample."""
    first_number: int
    """Number of the first shard."""
    processes: int
    """Downloading processes, each with its own shard."""
    threads: int
    """Connections open at once in each process."""
    distributor: Distributor
    """What starts the processes."""


def open_files_needed(threads: int) -> int:
    """Open files a downloading process may need: sockets, DNS sockets, and its own."""
    return FILES_PER_THREAD * threads + OTHER_FILES


def run_download(job: WorkerJob) -> None:
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
        distributor=job.distributor,
        image_size=config.image_px,
        resize_mode=config.storage.resize_mode,
        resize_only_if_bigger=config.storage.resize_only_if_bigger,
        encode_format=config.storage.encode_format,
        encode_quality=config.storage.encode_quality,
        skip_reencode=config.storage.skip_reencode,
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
    if job.distributor == "multiprocessing":
        _share_imports()
    from tasks.download.img2dataset_adapter import HardenedDownloader

    # `import img2dataset.main` would give the function of that name, and patch nothing
    main: Any = importlib.import_module("img2dataset.main")
    main.Downloader = partial(HardenedDownloader, config=job.config, counters=job.counters)
    main.LoggerProcess = _NoLogger
    main.Reader = partial(_numbered_reader, main.Reader, job.first_number)
    if job.distributor == "pyspark":
        # The session that img2dataset then finds; its own would take 16 GB for the driver.
        spark_builder("evaclip download", job.processes).getOrCreate()
    return main


def _share_imports() -> None:
    """Fork downloading processes from one that has imported everything, at once and in its memory;
    img2dataset's own spawning imports for 5 s and 0.8 GB in each of them."""
    # The fork server imports while this process does.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tasks.download.img2dataset_adapter"])
    forkserver.ensure_running()
    distributor: Any = importlib.import_module("img2dataset.distributor")
    distributor.get_context = lambda method: context


def _numbered_reader(reader: Callable[..., Any], first_number: int, *options: Any) -> Any:
    """img2dataset's reader, counting shards from `first_number`, which is its last option."""
    return reader(*options[:-1], first_number)


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
    run_download(WorkerJob.from_mapping(json.loads(path.read_text()), where=str(path)))
