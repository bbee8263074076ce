"""Compute every feature that an evaluation needs: list the missing ones and run the ranks.

One rank without a GPU works in this process; several, or any on a GPU, are processes of their own
under supervision, here or by the launcher of trainings, so that none outlives the evaluation.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from tasks.encoders.open_models import Identity
from tasks.evaluate.config import EvaluationMachine, Precision
from tasks.evaluate.encode.encode_features import (
    IMAGE_BLOCK,
    Cache,
    TextFeatures,
    image_blocks,
    read_features,
    texts_of,
)
from tasks.evaluate.encode.encode_worker import EncodeJob, ImageList, ImageWork, ModelWork, do_share
from tasks.evaluate.sets.published_layout import EvalSet
from tasks.process.ranks import RankState, run_ranks
from tasks.progress import Report

MAX_IDLE_STARTS = 2
"""Times in a row that ranks may end without a new block before the evaluation fails."""
_LOG_TAIL = 1500


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
        idle, before = 0, -1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        while models := self._missing_work(folder):
            left = sum(len(work.texts) + sum(one.count for one in work.images) for work in models)
            idle = idle + 1 if left == before else 0
            if idle > MAX_IDLE_STARTS:
                logs = [log.read_text(errors="replace") for log in sorted(folder.glob("*.log"))]
                raise InputError(
                    f"the ranks of the evaluation ended {idle} times without a new block; the end "
                    "of their log:\n" + "\n".join(log[-_LOG_TAIL:] for log in logs)
                )
            before = left
            job = EncodeJob(
                models=tuple(models),
                workers=self.machine.workers,
                device=self.machine.device,
                precision=self.precision,
            )

            def progress(done: int, detail: str, before: int = total - left) -> None:
                report(min(before + done, total), total, detail)

            ranks = min(self.machine.rank_count, max(map(_count_blocks, models)))
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
        path = folder / "job.json"
        write_atomically(path, job.model_dump_json(indent=1))
        tars = {one.samples[0].image.tar.resolve() for one in self.sets.values()}
        reads = (self.cache.root.resolve(), *sorted(tars))
        try:
            run_ranks("tasks.evaluate.encode.encode_worker", path, ranks, watch, launch, reads)
        finally:
            path.unlink()  # tells other machines that it is over

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


def _count_blocks(work: ModelWork) -> int:
    """Blocks of the most work that can be shared out at once."""
    return max([1, *(len(one.blocks) for one in work.images), len(work.texts) // IMAGE_BLOCK])
