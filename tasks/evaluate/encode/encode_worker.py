"""One rank of an evaluation: `python -m tasks.evaluate.encode.encode_worker JOB RANK`.

Ranks share files alone: each takes every RANKS-th block of those that were missing at the start,
and renames finished blocks into place. A killed rank loses the block it was working on.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from evaclip_model.config import Config
from evaclip_model.cpu.allocator import freed_memory_kept
from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.zeroshot.set_layout import Span
from tasks.encoders.encode_chunks import embed_images
from tasks.encoders.open_models import Subject, open_subject
from tasks.evaluate.config import Precision
from tasks.evaluate.encode.encode_features import FEATURES, encode_texts, image_blocks, write_block
from tasks.process.ranks import run_share

Progress = Callable[[int, str], None]
"""Called with the number of images and texts done, and the names of their model and set."""


class ImageList(Config):
    """The images of one set, as the processes that encode them receive them."""

    keys: tuple[str, ...]
    spans: tuple[Span, ...]
    crop_px: int
    """Cut off every side of every image first."""


class ImageWork(Config):
    """Blocks of one set's image features that one model has yet to compute."""

    name: str
    listed: Path
    """File of the images, an `ImageList`."""
    folder: Path
    """Folder of the finished blocks."""
    blocks: tuple[int, ...]
    count: int
    """Images in them."""


class ModelWork(Config):
    """Texts and images that one model has yet to encode."""

    name: str
    spec: str
    texts: tuple[str, ...]
    text_folder: Path
    images: tuple[ImageWork, ...]


class EncodeJob(Config):
    """All missing features, and the settings of the ranks that share the work."""

    models: tuple[ModelWork, ...]
    ranks: int
    workers: int
    """Decoding threads of each rank."""
    device: str
    precision: Precision


class RankState(Config):
    """Progress of a rank, for whoever started it."""

    done: int = 0
    """Images and texts."""
    detail: str = ""
    failed: Mapping[str, str] = {}
    """Set -> the reason why it cannot be evaluated, once the rank is done."""


def rank_file(job: Path, rank: int) -> Path:
    """File beside the job with a rank's `RankState`."""
    return job.with_name(f"state-{rank}.json")


def do_share(job: EncodeJob, rank: int, progress: Progress) -> dict[str, str]:
    """Do a rank's share of the job; returns set -> the reason why it cannot be evaluated.

    InputError if a model cannot be opened, or its features are not finite.
    """
    failed: dict[str, str] = {}
    done = 0

    def add(count: int, detail: str) -> None:
        nonlocal done
        done += count
        progress(done, detail)

    with (
        _exact_arithmetic(job.device),
        freed_memory_kept() if job.device == "cpu" else nullcontext(),
        ThreadPoolExecutor(job.workers, "decode") if job.workers else nullcontext() as pool,
    ):
        device = job.device if job.device == "cpu" else f"cuda:{rank % torch.cuda.device_count()}"
        for todo in job.models:
            subject = open_subject(todo.spec, device=device, precision=job.precision)
            if todo.texts:
                told = partial(add, detail=f"{todo.name}: texts")
                place = todo.text_folder
                encode_texts(subject, todo.texts, place, rank, job.ranks, progress=told)
            for work in todo.images:
                mine = work.blocks[rank :: job.ranks]
                if not mine or work.name in failed:
                    continue
                try:
                    for count in _do_images(subject, work, mine, pool):
                        add(count, f"{todo.name} on {work.name}")
                except UnusableSetError as error:
                    failed[work.name] = str(error)
    return failed


class UnusableSetError(InputError):
    """An image of a set cannot be decoded or cropped: the set fails, the others do not."""


def _do_images(
    subject: Subject, work: ImageWork, mine: Sequence[int], pool: Executor | None
) -> Iterator[int]:
    """Encode some blocks of a set; yields the number of images of each."""
    images = ImageList.model_validate_json(work.listed.read_text())
    blocks = image_blocks(work.folder, len(images.keys))
    load = partial(_load_pixels, images, subject.transform)

    def decode(number: int) -> Iterator[Tensor]:
        return (pool.map if pool else map)(load, blocks[number].rows)

    decoded = decode(mine[0])
    for number, following in zip(mine, [*mine[1:], None], strict=True):
        # Decoding the next block begins before this one is encoded.
        ahead = decode(following) if following is not None else decoded
        write_block(blocks[number].file, {FEATURES: embed_images(subject, decoded)})
        yield len(blocks[number].rows)
        decoded = ahead


def _load_pixels(images: ImageList, transform: Callable[[Image.Image], Tensor], row: int) -> Tensor:
    where, edge = f"{images.spans[row].tar}: image {images.keys[row]}", images.crop_px
    try:
        image = decode_image(images.spans[row].read())
        width, height = image.size
        if not edge:
            return transform(image)
        if min(width, height) > 2 * edge:
            return transform(image.crop((edge, edge, width - edge, height - edge)))
    except (UnreadableImageError, InputError) as error:  # undecodable, or its tar was cut short
        raise UnusableSetError(
            f"{where}: {error}; every image of a set is evaluated or none, so fetch or write this "
            "set again"
        ) from None
    raise UnusableSetError(
        f"{where} has {width} x {height} pixels, of which crop_px = {edge} leaves none: give less"
    )


@contextmanager
def _exact_arithmetic(device: str) -> Iterator[None]:
    """One thread on a CPU, and no TF32: features must not depend on where they are computed.
    Pillow's warnings about odd palettes are silenced, because nobody can act on them."""
    threads, convolutions = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(matmul)


def share_job(path: Path, rank: int) -> None:
    """Do a rank's share of the job in a file."""
    said = RankState()

    def say(**more: Any) -> None:
        nonlocal said
        said = said.model_copy(update=more)
        write_atomically(rank_file(path, rank), said.model_dump_json())

    job = EncodeJob.model_validate_json(path.read_text())
    say(failed=do_share(job, rank, lambda done, detail: say(done=done, detail=detail)))


if __name__ == "__main__":
    sys.exit(run_share(share_job))
