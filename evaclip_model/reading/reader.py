"""Batches for training, the same whatever the number of ranks and of reading processes.

Not here: the order (order.py); pixels (transform.py); fetching shards (shard_store.py); tokens and
masks (training/trainer.py).

A batch is a function of (shards, settings, step): a run that resumes asks for the next step, and
nothing has to be replayed. A sample that cannot be decoded is counted and replaced by the one after
it in the same window. webdataset's pipelines know no place to go on from.

Processes may read and decode ahead, as torch's DataLoader runs them. A worker is a rank within the
rank: it owns an equal run of the rank's positions and makes their part of every step, so how many
there are changes no batch. A lane that two share is read by both, each sample decoded by one.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.reading import samples as stored_samples
from evaclip_model.reading.config import SamplingConfig
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.reading.order import ORDERS, Mixture, Piece, share_of_batch
from evaclip_model.reading.shard_store import ShardStore
from evaclip_model.reading.transform import decode_fast, train_crop
from evaclip_model.reading.urls import is_url, resolve_location

SHARDS_AHEAD = 2
"""Shards of every lane and source at hand or on their way: the one in use, and the next."""
PARTS_AHEAD = 3
"""Steps that a worker may be ahead of its rank."""


class Origin(NamedTuple):
    shard: str
    """Path of its tar, relative to the manifest."""
    key: str
    image: int
    """`number_bytes` of its stored image."""


@dataclass(frozen=True)
class Batch:
    """A rank's share of one step: b samples, in the order of their positions."""

    step: int
    images: Tensor
    """[b, 3, S, S] uint8, the channels last in memory."""
    captions: tuple[str, ...]
    positions: Tensor
    """[b] int64, place of each sample in the whole of training."""
    origins: tuple[Origin, ...]


class ReadSettings(Config):
    """Limits on what reading costs; no batch depends on them."""

    workers: int = 0
    """Processes that read and decode ahead, at most; 0: a thread. They import the main module
    again: a script that asks for them does its work under `if __name__ == "__main__"`."""
    shard_cache: Path | None = None
    """Folder for shards that are fetched from a URL."""
    shard_cache_bytes: int = 0


@dataclass(slots=True)
class _Loaded:
    """A sample in memory: its caption, and its image as it is stored."""

    image: bytes | memoryview
    caption: str
    further: stored_samples.Captions
    origin: Origin
    flaw: stored_samples.MemberFlaw | None


class _Window(NamedTuple):
    epoch: int
    number: int
    samples: list[_Loaded]
    shuffled: list[int]


class BatchReader:
    """A rank's share of every step's batch; `bad` counts unusable samples by reason."""

    def __init__(
        self,
        shards: Path | str,
        config: SamplingConfig,
        *,
        rank: int,
        ranks: int,
        settings: ReadSettings,
    ) -> None:
        """Plan the reading of the shards of a manifest, a path or a URL. Raises InputError: a
        source without shards, fewer samples than lanes or than a step takes, or more ranks than
        pairs."""
        self._config = config
        self._location = shards
        self._rank, self._ranks = rank, ranks
        self._settings = settings
        manifest = stored_samples.ShardManifest.read(shards)
        by_source = manifest.by_source()
        weights = _resolve_weights(by_source, config, shards)
        self._share = share_of_batch(config.global_batch, rank, ranks)
        if not self._share:
            raise InputError(
                f"{ranks} ranks cannot share {config.global_batch} pairs: start fewer of them"
            )
        self._mixture = Mixture(weights, config.global_batch, config.lanes)
        self._shape = (len(self._share), config.image_px, config.image_px, 3)
        self._shards = [by_source[name] for name in weights]
        self._orders = [
            ORDERS[config.sampling](
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
        samples = sum(order.total for order in self._orders)
        if samples < config.global_batch:
            raise InputError(
                f"global_batch = {config.global_batch:,} is larger than the {samples:,} samples of "
                f"{', '.join(weights)}: a step would hold samples more than once and take their "
                "copies for negatives; set it lower, or add samples"
            )
        self._decode = decode_fast if config.decode == "fast" else decode_image
        folder = str(shards).rpartition("/")[0] if is_url(shards) else str(Path(shards).parent)
        is_remote = any(is_url(resolve_location(folder, one.path)) for one in manifest.shards)
        if is_remote and settings.shard_cache is None:
            raise InputError(f"{shards} has shards at URLs: name a folder to fetch them into")
        cache = settings.shard_cache if is_remote else None
        room = settings.shard_cache_bytes
        self._store = ShardStore(folder, cache, room, rank=rank, ranks=ranks)
        self._streams: dict[tuple[int, int], _ShardStream] = {}
        self._windows: dict[tuple[int, int], _Window] = {}
        self._coming: dict[tuple[int, int], tuple[tuple[int, int], Future[_Window]]] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="windows")
        self.bad: Counter[str] = Counter()

    def iterate_batches(self, first_step: int, steps: int) -> Generator[Batch, None, None]:
        """Batches from `first_step` to `steps` (exclusive), the next ones made while one is used;
        raises as `read_batch`, and RuntimeError when a reading process crashed or was killed."""
        workers = min(self._settings.workers, len(self._share))
        if not workers:
            with ThreadPoolExecutor(1, thread_name_prefix="reader") as ahead:
                following: Future[Batch] | None = None
                for step in range(first_step, steps):
                    batch = following.result() if following else self.read_batch(step)
                    is_last = step + 1 == steps
                    following = None if is_last else ahead.submit(self.read_batch, step + 1)
                    yield batch
            return
        with self._start_workers(workers, first_step, steps) as made:
            for step in range(first_step, steps):
                parts = [_raise_error(next(made)) for _ in range(workers)]  # which lie end to end
                images = self._allocate_images()
                torch.cat([part.batch.images for part in parts], out=images)
                for part in parts:
                    self.bad.update(part.bad)
                captions = tuple(caption for part in parts for caption in part.batch.captions)
                origins = tuple(origin for part in parts for origin in part.batch.origins)
                yield Batch(step, images, captions, self._list_positions(step), origins)

    def read_batch(self, step: int) -> Batch:
        """This rank's share of one step; raises InputError: an unreadable shard or window."""
        positions = self._list_positions(step)
        images = self._allocate_images()
        captions: list[str] = []
        origins: list[Origin] = []
        weights = self._config.caption_weights
        for lane, mine in self._mixture.cut_lanes(self._share):
            sources = self._mixture.draw_sources(step, lane)
            drawn = self._mixture.drawn_before(step, lane)
            drawn += np.bincount(sources[: mine.start], minlength=len(drawn))
            for source in sources[mine].tolist():
                place = len(captions)
                position = int(positions[place])
                image, loaded = self._draw_sample(source, lane, int(drawn[source]), position)
                drawn[source] += 1
                images[place] = image
                caption = loaded.caption
                if loaded.further:
                    caption = stored_samples.choose_caption(
                        caption, loaded.further, weights, seed=self._config.seed, position=position
                    )
                captions.append(caption)
                origins.append(loaded.origin)
        return Batch(step, images, tuple(captions), positions, tuple(origins))

    def count_drawn(self, steps: int) -> dict[str, int]:
        """Samples of each source in the first `steps` steps, over all ranks."""
        lanes = range(self._config.lanes)
        counts = sum(self._mixture.drawn_before(steps, lane) for lane in lanes)
        return dict(zip(self._mixture.sources, np.asarray(counts).tolist(), strict=True))

    def close(self) -> None:
        """Close files, and clear away what was fetched; for when no further batch is wanted."""
        self._loader.shutdown(cancel_futures=True)
        for stream in self._streams.values():
            stream.close()
        self._store.close()

    def _allocate_images(self) -> Tensor:
        """[b, 3, S, S] uint8 of any content, the channels last in memory."""
        return torch.empty(self._shape, dtype=torch.uint8).permute(0, 3, 1, 2)

    def _list_positions(self, step: int) -> Tensor:
        first = step * self._config.global_batch
        return torch.arange(first + self._share.start, first + self._share.stop)

    @contextmanager
    def _start_workers(
        self, workers: int, first_step: int, steps: int
    ) -> Generator[Iterator[_Part | InputError], None, None]:
        """Yield what gives the parts of every step in their order, made ahead in /dev/shm."""
        config = self._config.model_dump(include=set(SamplingConfig.model_fields))
        room = self._settings.shard_cache_bytes // workers
        settings = self._settings.model_copy(update={"workers": 0, "shard_cache_bytes": room})
        given = self._location, SamplingConfig.model_validate(config), settings
        loader = DataLoader(
            _Parts(*given, self._rank, self._ranks, first_step, steps),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PARTS_AHEAD,
            worker_init_fn=_ignore_signals,
            multiprocessing_context="spawn",  # a rank has threads, which no fork survives
            generator=torch.Generator(),  # the loader draws a seed, which nothing of ours needs
        )
        made: Any = iter(loader)
        try:
            yield made
        finally:  # now, not when nothing refers to it: an error's traceback does
            made._shutdown_workers()

    def _draw_sample(
        self, source: int, lane: int, draw: int, position: int
    ) -> tuple[Tensor, _Loaded]:
        """The cropped image and the sample of a draw, or of the next usable one in its window."""
        epoch, number, place = self._orders[source].locate_draw(lane, draw)
        window = self._open_window(source, lane, epoch, number)
        is_near_end = place >= len(window.samples) // 2
        if is_near_end and (source, lane) not in self._coming:
            after = self._orders[source].next_window(lane, epoch, number)
            future = self._loader.submit(self._load_window, source, lane, *after)
            self._coming[source, lane] = (after, future)
        for offset in range(len(window.samples)):
            loaded = window.samples[window.shuffled[(place + offset) % len(window.samples)]]
            try:
                return self._crop_image(loaded, position), loaded
            except UnreadableImageError as error:
                self.bad[str(error).partition(":")[0]] += 1
        pieces = self._orders[source].list_pieces(lane, epoch, number)
        paths = sorted({self._shards[source][piece.shard].path for piece in pieces})
        raise InputError(
            f"none of {len(window.samples)} samples in {', '.join(paths)} can be used: "
            "verify the shards again"
        )

    def _crop_image(self, loaded: _Loaded, position: int) -> Tensor:
        if loaded.flaw is not None:
            raise UnreadableImageError(loaded.flaw)
        picture, config = self._decode(loaded.image), self._config
        return train_crop(
            picture, config.image_px, seed=config.seed, position=position, scale=config.crop_scale
        )

    def _open_window(self, source: int, lane: int, epoch: int, number: int) -> _Window:
        """The samples of a window; the newest of every lane and source stays in memory."""
        held = self._windows.get((source, lane))
        if held is not None and (held.epoch, held.number) == (epoch, number):
            return held
        wanted, coming = self._coming.pop((source, lane), (None, None))
        # Only one window of a lane is loaded at a time: they share an open shard.
        window = coming.result() if coming is not None else None
        if window is None or wanted != (epoch, number):
            window = self._load_window(source, lane, epoch, number)
        self._windows[source, lane] = window
        return window

    def _load_window(self, source: int, lane: int, epoch: int, number: int) -> _Window:
        order = self._orders[source]
        ahead = order.shards_from(lane, epoch, number, SHARDS_AHEAD)
        self._store.announce_shards(self._shards[source][shard] for shard in ahead)
        samples: list[_Loaded] = []
        for piece in order.list_pieces(lane, epoch, number):
            samples.extend(self._load_piece(source, lane, piece))
        return _Window(epoch, number, samples, order.shuffle_window(lane, epoch, number).tolist())

    def _load_piece(self, source: int, lane: int, piece: Piece) -> list[_Loaded]:
        """A piece, read from where the lane stands."""
        shard = self._shards[source][piece.shard]
        held = self._streams.get((source, lane))
        if held is None or held.shard is not shard or held.samples.next > piece.start:
            if held is not None:
                held.close()
            held = self._streams[source, lane] = self._open_stream(shard)
        return held.take_samples(piece.start, piece.stop)

    def _open_stream(self, shard: stored_samples.Shard) -> _ShardStream:
        has_captions = shard.captions and self._config.caption_weights
        location = resolve_location(self._store.folder, shard.captions)
        further = stored_samples.read_captions(location) if has_captions else {}
        return _ShardStream(shard, self._store.open_shard(shard), further)


class _ShardStream(NamedTuple):
    """A shard read front to back, once, in parts."""

    shard: stored_samples.Shard
    samples: stored_samples.SampleReader
    captions: Mapping[str, stored_samples.Captions]

    def take_samples(self, start: int, stop: int) -> list[_Loaded]:
        """Samples `start` to `stop` (exclusive), skipping those before; raises InputError."""
        path = self.shard.path
        try:
            taken = self.samples.read(start, stop)
        except stored_samples.BrokenShard as error:
            raise InputError(f"{error}; verify the shards again") from error
        if len(taken) < stop - start:
            raise InputError(
                f"{path} ends before sample {stop} of {self.shard.samples}: verify the shards again"
            )
        further = (self.captions.get(one.key, {}) for one in taken)
        origins = (Origin(path, one.key, stored_samples.number_bytes(one.image)) for one in taken)
        return [
            _Loaded(one.image, one.caption, captions, origin, one.flaw)
            for one, captions, origin in zip(taken, further, origins, strict=True)
        ]

    def close(self) -> None:
        self.samples.close()


def _resolve_weights(
    by_source: Mapping[str, Sequence[stored_samples.Shard]],
    config: SamplingConfig,
    shards: Path | str,
) -> dict[str, float]:
    """Share of each source that is drawn, in the order of the sources' names."""
    weights = config.source_weights or {
        name: float(sum(shard.samples for shard in held)) for name, held in by_source.items()
    }
    if unknown := sorted(set(weights) - set(by_source)):
        raise InputError(
            f"source_weights names '{unknown[0]}', but {shards} holds {', '.join(by_source)}"
        )
    return {name: weights[name] for name in by_source if name in weights}


@dataclass(frozen=True)
class _Part:
    """A worker's part of a step, and the unusable samples that it met since the one before."""

    batch: Batch
    bad: Mapping[str, int]


@dataclass(frozen=True)
class _Parts(IterableDataset[_Part | InputError]):
    """The parts of a worker, one a step; an InputError, which torch would wrap, is the last."""

    shards: Path | str
    config: SamplingConfig
    settings: ReadSettings
    rank: int
    ranks: int
    first_step: int
    steps: int

    def __iter__(self) -> Iterator[_Part | InputError]:
        worker = get_worker_info()
        assert worker is not None, "the process of a rank makes batches, not parts"
        rank, ranks = self.rank * worker.num_workers + worker.id, self.ranks * worker.num_workers
        given = self.shards, self.config
        try:
            reader = BatchReader(*given, rank=rank, ranks=ranks, settings=self.settings)
            with closing(reader):
                for batch in reader.iterate_batches(self.first_step, self.steps):
                    bad = dict(reader.bad)
                    reader.bad.clear()
                    yield _Part(batch, bad)
        except InputError as error:
            yield error


def _raise_error(part: _Part | InputError) -> _Part:
    if isinstance(part, InputError):
        raise part
    return part


def _ignore_signals(_: int) -> None:
    """Ctrl-C and a launcher's SIGTERM reach the whole group; the rank still saves a checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
