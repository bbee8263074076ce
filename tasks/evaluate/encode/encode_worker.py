"""One rank of an evaluation: `python -m tasks.evaluate.encode.encode_worker JOB`.

Ranks share files alone: each takes every RANKS-th block of those that were missing at the start,
and renames finished blocks into place. A killed rank loses the block it was working on.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from evaclip_model.config import Config
from evaclip_model.cpu.allocator import freed_memory_kept
from evaclip_model.errors import InputError
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.zeroshot.encode_chunks import Subject, embed_images, exact_arithmetic
from evaclip_model.zeroshot.set_layout import Span
from tasks.encoders.open_models import count_workers, device_of, open_subject
from tasks.evaluate.config import Precision
from tasks.evaluate.encode.encode_features import FEATURES, encode_texts, image_blocks, write_block
from tasks.process.ranks import RankState, run_share, say_state


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
    workers: int | None
    """Decoding threads of each rank; None: the cores that its machine's GPUs leave."""
    device: str
    precision: Precision


def do_share(job: EncodeJob, rank: int, ranks: int, say: Callable[[RankState], None]) -> None:
    """Do a rank's share of the job and `say` how far it is, at the end also which sets cannot be
    evaluated and why. InputError: a model cannot be opened, or its features are not finite."""
    failed: dict[str, str] = {}
    workers = count_workers(job.workers, job.device)
    said = RankState()

    def add(count: int, detail: str) -> None:
        nonlocal said
        said = RankState(done=said.done + count, detail=detail)
        say(said)

    with (
        exact_arithmetic(job.device),
        freed_memory_kept() if job.device == "cpu" else nullcontext(),
        ThreadPoolExecutor(workers, "decode") if workers else nullcontext() as pool,
    ):
        device = device_of(job.device, rank)
        for todo in job.models:
            subject = open_subject(todo.spec, device=device, precision=job.precision)
            if todo.texts:
                told = partial(add, detail=f"{todo.name}: texts")
                encode_texts(subject, todo.texts, todo.text_folder, rank, ranks, progress=told)
            for work in todo.images:
                mine = work.blocks[rank::ranks]
                if not mine or work.name in failed:
                    continue
                try:
                    for count in _do_images(subject, work, mine, pool):
                        add(count, f"{todo.name} on {work.name}")
                except UnusableSetError as error:
                    failed[work.name] = str(error)
    say(said.model_copy(update={"failed": failed}))


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


def share_job(path: Path, rank: int, ranks: int) -> None:
    """Do a rank's share of the job in a file."""
    job = EncodeJob.model_validate_json(path.read_text())
    do_share(job, rank, ranks, partial(say_state, path, rank))


if __name__ == "__main__":
    sys.exit(run_share(share_job))
