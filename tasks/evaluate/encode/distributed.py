"""Compute every feature that an evaluation needs: list the missing ones and run the ranks.

One rank without a GPU works in this process; several, or any on a GPU, are processes of their own
under supervision, here or by the launcher of trainings, so that none outlives the evaluation.
`python -m tasks.evaluate.encode.distributed JOB` is such a rank. Ranks share files alone: each
takes every RANKS-th block of those that were missing at the start, and renames finished blocks into
place. A killed rank loses the block it was working on.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

from PIL import Image
from torch import Tensor

from evaclip_model.config import Config
from evaclip_model.cpu.allocator import freed_memory_kept
from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.zeroshot.encode_chunks import Subject, embed_images, exact_arithmetic
from evaclip_model.zeroshot.set_layout import Span
from tasks.encoders.open_models import Identity, count_workers, device_of, open_subject
from tasks.evaluate.config import EvaluationMachine, Precision
from tasks.evaluate.encode.encode_features import (
    FEATURES,
    IMAGE_BLOCK,
    Cache,
    TextFeatures,
    encode_texts,
    image_blocks,
    read_features,
    texts_of,
    write_block,
)
from tasks.evaluate.sets.published_layout import EvalSet
from tasks.process.launch import RankState, iterate_starts, run_ranks, run_share
from tasks.progress import Report


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


@dataclass(frozen=True)
class Features:
    """The features of some models on some sets: their places, and how they are computed."""

    cache: Cache
    machine: EvaluationMachine
    precision: Precision
    specs: Mapping[str, str]
    """Model -> the specification that opens it."""
    models: Mapping[str, Identity]
    sets: Mapping[str, EvalSet]
    failed: dict[str, str] = field(default_factory=dict)
    """Set -> the reason why it cannot be evaluated."""

    def compute_missing(self, folder: Path, report: Report) -> None:
        """Compute the missing features; add the sets that cannot be evaluated to `failed`.

        `folder` is for the job and the logs of the ranks, of this evaluation alone. InputError if a
        model cannot be opened, its features are not finite, or ranks die again and again.
        """
        total = sum(len(one) + len(texts_of(one)) for one in self.sets.values()) * len(self.models)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        find_missing = partial(self._missing_work, folder)
        for models in iterate_starts(find_missing, _count_missing, folder):
            left = _count_missing(models)
            job = EncodeJob(
                models=tuple(models),
                workers=self.machine.workers,
                device=self.machine.device,
                precision=self.precision,
            )

            def progress(done: int, detail: str, before: int = total - left) -> None:
                report(min(before + done, total), total, detail)

            blocks = [len(one.blocks) for work in models for one in work.images]
            blocks += [len(work.texts) // IMAGE_BLOCK for work in models]
            ranks = min(self.machine.rank_count, max(1, *blocks))
            self._run_ranks(job, folder, ranks, progress)
        shutil.rmtree(folder)
        report(total, total)

    def _run_ranks(
        self, job: EncodeJob, folder: Path, ranks: int, progress: Callable[[int, str], None]
    ) -> None:
        """Run all ranks once, whether they succeed or fail; add sets that cannot be evaluated."""
        launch = self.machine.launch

        def watch(states: Sequence[RankState]) -> None:
            progress(sum(one.done for one in states), states[0].detail if states else "")
            for one in states:
                self.failed.update(one.failed)

        if ranks == 1 and job.device == "cpu" and launch.is_local:
            do_share(job, 0, 1, lambda said: watch([said]))
            return
        tars = {one.samples[0].image.tar.resolve() for one in self.sets.values()}
        reads = (self.cache.root.resolve(), *sorted(tars))
        module, path = "tasks.evaluate.encode.distributed", folder / "job.json"
        run_ranks(module, job, path, ranks, watch, launch, reads, job.device != "cpu")

    def image_features(self, model: str, name: str) -> Tensor:
        """Unit features of all images of a set [N, D]; RuntimeError if they are not all there."""
        evalset = self.sets[name]
        features = read_features(self._image_folder(model, evalset), len(evalset))
        if features is None or len(features) != len(evalset):
            raise RuntimeError(f"set '{name}': not all of its {len(evalset)} images were evaluated")
        return features

    def text_features(self, model: str) -> TextFeatures:
        return TextFeatures(self._text_folder(model))

    def _missing_work(self, folder: Path) -> list[ModelWork]:
        """Work that is left, of the sets that have not failed; texts that two models share are
        the first one's."""
        found: list[ModelWork] = []
        planned: set[Path] = set()
        sets = [one for name, one in self.sets.items() if name not in self.failed]
        wanted = list(dict.fromkeys(text for one in sets for text in texts_of(one)))
        for model in self.models:
            place = self._text_folder(model)
            texts = [] if place in planned else TextFeatures(place).missing_texts(wanted)
            planned.add(place)
            images = tuple(self._missing_images(model, folder, planned))
            if texts or images:
                about = {"name": model, "spec": self.specs[model], "text_folder": place}
                found.append(ModelWork(**about, texts=tuple(texts), images=images))
        return found

    def _missing_images(self, model: str, folder: Path, planned: set[Path]) -> Iterator[ImageWork]:
        for at, (name, evalset) in enumerate(self.sets.items()):
            if name in self.failed:
                continue
            place = self._image_folder(model, evalset)
            blocks = {
                number: len(block.rows)
                for number, block in enumerate(image_blocks(place, len(evalset)))
                if place not in planned and block.read() is None
            }
            planned.add(place)
            if blocks:
                listed = folder / f"images-{at}.json"
                if not listed.is_file():
                    keys, spans = zip(*((x.key, x.image) for x in evalset.samples), strict=True)
                    images = ImageList(keys=keys, spans=spans, crop_px=evalset.crop_px)
                    write_atomically(listed, images.model_dump_json())
                yield ImageWork(
                    name=name,
                    listed=listed,
                    folder=place,
                    blocks=tuple(blocks),
                    count=sum(blocks.values()),
                )

    def _image_folder(self, model: str, evalset: EvalSet) -> Path:
        one = self.models[model]
        return self.cache.open_folder(
            "images", f"{one.digest}-{one.transform_digest}-{self._made_by}", evalset.images_digest
        )

    def _text_folder(self, model: str) -> Path:
        one = self.models[model]
        return self.cache.open_folder("texts", f"{one.text_digest}-{self._made_by}")

    @property
    def _made_by(self) -> str:
        """Precision, device and version, which decide the last bits of a feature."""
        return f"{self.precision}-{self.machine.device}-torch{metadata.version('torch')}"


def _count_missing(models: Sequence[ModelWork]) -> int:
    """Texts and images."""
    return sum(len(work.texts) + sum(one.count for one in work.images) for work in models)


def do_share(job: EncodeJob, rank: int, ranks: int, say: Callable[[RankState], None]) -> None:
    """Do a rank's share of the job and `say` how far it is, at the end also which sets cannot be
    evaluated and why. InputError: a model cannot be opened, or its features are not finite."""
    failed: dict[str, str] = {}
    device, workers = device_of(job.device, rank), count_workers(job.workers, job.device)
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


if __name__ == "__main__":
    sys.exit(run_share(EncodeJob, do_share))
