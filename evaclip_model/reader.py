"""Batches for training, the same whatever the number of ranks.

Covers: reading shards in the order that order.py decides, decoding, cropping, captions, a memory
of decoded images. Not here: the order itself; tokens and masks (trainer.py).

A batch is a function of (shards, settings, step): a run that resumes asks for the next step, and
nothing has to be replayed. A sample that cannot be decoded is counted and replaced by the one after
it in the same window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.order import Mixture, Piece, SourceOrder
from evaclip_model.samples import BrokenShard, Shard, ShardManifest, read_samples
from evaclip_model.train_config import TrainConfig
from evaclip_model.transform import UnreadableImageError, decode_image, train_crop


@dataclass(frozen=True)
class Batch:
    """A rank's share of one step: b samples, in the order of their positions."""

    step: int
    images: Tensor
    """[b, 3, S, S] uint8."""
    captions: tuple[str, ...]
    positions: Tensor
    """[b] int64, place of each sample in the whole of training."""


class _Loaded:
    """A sample in memory: its caption, and its image encoded or, when kept, decoded."""

    __slots__ = ("caption", "image")

    def __init__(self, image: bytes | Image.Image, caption: str) -> None:
        self.image = image
        self.caption = caption


class BatchReader:
    """A rank's share of every step's batch.

    Attributes:
        bad: reason -> samples that could not be used, counted each time one is met.
    """

    def __init__(
        self, shards: Path, config: TrainConfig, *, rank: int, ranks: int, cache_bytes: int
    ) -> None:
        """Plan the reading of a manifest's shards; files are opened when their turn comes.

        Raises:
            InputError: a source without shards or weight, fewer samples than lanes, or ranks that
                do not divide the lanes.
        """
        self._config = config
        self._folder = shards.parent
        by_source = ShardManifest.read(shards).by_source()
        weights = _weights(by_source, config, shards)
        if config.lanes % ranks:
            raise InputError(
                f"{ranks} ranks cannot share {config.lanes} lanes evenly: "
                f"set 'lanes' to a multiple of {ranks}"
            )
        per_rank = config.lanes // ranks
        self._lanes = range(rank * per_rank, (rank + 1) * per_rank)
        self._mixture = Mixture(weights, config.global_batch, config.lanes)
        self._shards = [by_source[name] for name in weights]
        self._orders = [
            SourceOrder(
                [shard.samples for shard in by_source[name]],
                source=number,
                lanes=config.lanes,
                window=config.shuffle_buffer,
                seed=config.seed,
            )
            for number, name in enumerate(weights)
        ]
        for name, order in zip(weights, self._orders, strict=True):
            if order.total < config.lanes:
                raise InputError(
                    f"source '{name}' has {order.total} samples for {config.lanes} lanes: "
                    "set 'lanes' lower, or add samples"
                )
        total = sum(shard.bytes for shards in self._shards for shard in shards)
        self._room_for_all = total <= cache_bytes
        self._room = cache_bytes - total if self._room_for_all else 0
        self._kept: dict[tuple[int, int], list[_Loaded]] = {}
        self._streams: dict[tuple[int, int], _ShardStream] = {}
        self._windows: dict[tuple[int, int], _Window] = {}
        self.bad: Counter[str] = Counter()

    def batches(self, first_step: int, steps: int) -> Generator[Batch, None, None]:
        """Batches from `first_step` to `steps` (exclusive), the next one made while one is used."""
        with ThreadPoolExecutor(1, thread_name_prefix="reader") as ahead:
            following: Future[Batch] | None = None
            for step in range(first_step, steps):
                batch = following.result() if following else self.batch(step)
                following = ahead.submit(self.batch, step + 1) if step + 1 < steps else None
                yield batch

    def batch(self, step: int) -> Batch:
        """This rank's share of one step.

        Raises:
            InputError: a shard cannot be read, or a whole window holds no usable sample.
        """
        images, captions, positions = [], [], []
        for lane in self._lanes:
            drawn = self._mixture.drawn_before(step, lane)
            start = step * self._config.global_batch + lane * self._mixture.per_lane
            for place, source in enumerate(self._mixture.draws(step, lane).tolist()):
                image, caption = self._sample(source, lane, int(drawn[source]), start + place)
                drawn[source] += 1
                images.append(image)
                captions.append(caption)
                positions.append(start + place)
        return Batch(step, torch.stack(images), tuple(captions), torch.tensor(positions))

    def drawn(self, steps: int) -> dict[str, int]:
        """Samples of each source in the first `steps` steps, over all ranks."""
        lanes = range(self._config.lanes)
        counts = sum(self._mixture.drawn_before(steps, lane) for lane in lanes)
        return dict(zip(self._mixture.sources, np.asarray(counts).tolist(), strict=True))

    def _sample(self, source: int, lane: int, draw: int, position: int) -> tuple[Tensor, str]:
        """The cropped image and the caption of a draw, or of the next usable one in its window."""
        epoch, number, place = self._orders[source].locate(lane, draw)
        window = self._window(source, lane, epoch, number)
        for offset in range(len(window.samples)):
            loaded = window.samples[window.shuffled[(place + offset) % len(window.samples)]]
            try:
                return self._crop(loaded, position), loaded.caption
            except UnreadableImageError as error:
                self.bad[str(error).partition(":")[0]] += 1
        pieces = self._orders[source].pieces(lane, epoch, number)
        paths = sorted({self._shards[source][piece.shard].path for piece in pieces})
        raise InputError(
            f"none of {len(window.samples)} images in {', '.join(paths)} can be decoded: "
            "verify the shards again"
        )

    def _crop(self, loaded: _Loaded, position: int) -> Tensor:
        image = loaded.image
        if isinstance(image, bytes):
            image = decode_image(image)
            size = image.width * image.height * len(image.getbands())
            if size <= self._room:
                self._room -= size
                loaded.image = image
        config = self._config
        return train_crop(
            image, config.image_px, seed=config.seed, position=position, scale=config.crop_scale
        )

    def _window(self, source: int, lane: int, epoch: int, number: int) -> _Window:
        """The samples of a window; the newest of every lane and source stays in memory."""
        held = self._windows.get((source, lane))
        if held is not None and (held.epoch, held.number) == (epoch, number):
            return held
        samples: list[_Loaded] = []
        for piece in self._orders[source].pieces(lane, epoch, number):
            samples.extend(self._load(source, lane, piece))
        shuffled = self._orders[source].shuffled(lane, epoch, number).tolist()
        self._windows[source, lane] = window = _Window(epoch, number, samples, shuffled)
        return window

    def _load(self, source: int, lane: int, piece: Piece) -> list[_Loaded]:
        """A piece, from memory when all shards fit into it, else from where the lane stands."""
        shard = self._shards[source][piece.shard]
        if self._room_for_all:
            if (source, piece.shard) not in self._kept:
                stream = _ShardStream(self._folder / shard.path, shard)
                self._kept[source, piece.shard] = stream.take(0, shard.samples)
            return self._kept[source, piece.shard][piece.start : piece.stop]
        open_stream = self._streams.get((source, lane))
        if open_stream is None or not open_stream.reaches(shard, piece.start):
            open_stream = _ShardStream(self._folder / shard.path, shard)
            self._streams[source, lane] = open_stream
        return open_stream.take(piece.start, piece.stop)


@dataclass(frozen=True)
class _Window:
    epoch: int
    number: int
    samples: list[_Loaded]
    shuffled: list[int]


class _ShardStream:
    """A shard read front to back, once, in parts."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self._path = path
        self._shard = shard
        self._samples = read_samples(path)
        self._next = 0

    def reaches(self, shard: Shard, start: int) -> bool:
        """Whether sample `start` of `shard` is still ahead."""
        return self._shard is shard and self._next <= start

    def take(self, start: int, stop: int) -> list[_Loaded]:
        """Samples `start` to `stop` (exclusive), skipping what lies before them.

        Raises:
            InputError: the shard does not hold what its manifest says.
        """
        try:
            taken = list(islice(self._samples, start - self._next, stop - self._next))
        except BrokenShard as error:
            raise InputError(f"{error}; verify the shards again") from error
        if len(taken) < stop - start:
            raise InputError(
                f"{self._path} ends before sample {stop} of {self._shard.samples}: "
                "verify the shards again"
            )
        self._next = stop
        return [_Loaded(sample.image, sample.caption) for sample in taken]


def _weights(
    by_source: Mapping[str, Sequence[Shard]], config: TrainConfig, shards: Path
) -> dict[str, float]:
    """Share of each source that is drawn, in the order of the sources' names."""
    if not config.source_weights:
        return {
            name: float(sum(shard.samples for shard in held)) for name, held in by_source.items()
        }
    unknown = sorted(set(config.source_weights) - set(by_source))
    if unknown:
        raise InputError(
            f"source_weights names '{unknown[0]}', but {shards} holds {', '.join(by_source)}"
        )
    return {
        name: config.source_weights[name] for name in by_source if name in config.source_weights
    }
