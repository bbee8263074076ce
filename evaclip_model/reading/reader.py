"""Batches for training, the same whatever the number of ranks and of reading processes.

Not here: the order (order.py); pixels (transform.py); fetching shards (shard_store.py); tokens and
masks (training/trainer.py).

A batch is a function of (shards, settings, step): a run that resumes asks for the next step, and
nothing has to be replayed. A sample that cannot be decoded is counted and replaced by the one after
it in the same window. webdataset's pipelines know no place to go on from.

Processes may read and decode ahead. A worker is a rank within the rank: it owns an equal run of the
rank's positions and makes their part of every step, so how many there are changes no batch. A lane
that two share is read by both, each sample decoded by one. Images come in memory shared with the
rank, a ring of `SLOTS` steps; captions and counts in a line of JSON. A worker whose rank is gone
reads the end of its standard input, or fails to write, and ends.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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
WORKER = (sys.executable, "-m", __name__)
SLOTS = 3
"""Steps that a worker may be ahead of its rank."""
END_S = 10.0
"""Seconds for a worker to end once its input is closed."""
_GO = b"."


class Origin(NamedTuple):
    shard: str
    """Path of its tar, relative to the manifest."""
    key: str
    image: int
    """`number_bytes` of its stored image."""


class Part(NamedTuple):
    """A worker's part of a step."""

    images: Tensor
    """[b, 3, S, S] uint8, in shared memory until the next part is asked for."""
    captions: Sequence[str]
    origins: Sequence[Origin]
    bad: Mapping[str, int]


class WorkerFailed(RuntimeError):
    """A worker ended without a reason of the user's making; its standard error says why."""


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
    """Processes that read and decode ahead, at most; 0: a thread."""
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
        raises as `read_batch`, and WorkerFailed when a reading process crashed or was killed."""
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
        with ExitStack() as stack:
            team = [
                stack.enter_context(closing(worker))
                for worker in self._start_workers(workers, first_step, steps)
            ]
            for step in range(first_step, steps):
                parts = [worker.receive_part() for worker in team]  # which lie end to end
                images = self._allocate_images()
                torch.cat([part.images for part in parts], out=images)
                for part in parts:
                    self.bad.update(part.bad)
                captions = tuple(caption for part in parts for caption in part.captions)
                origins = tuple(origin for part in parts for origin in part.origins)
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

    def _start_workers(self, workers: int, first_step: int, steps: int) -> Iterator[Worker]:
        config = self._config
        limits = {"shard_cache_bytes": self._settings.shard_cache_bytes // workers, "workers": 0}
        for worker in range(workers):
            settings: dict[str, Any] = {
                "shards": str(self._location),
                "sampling": config.model_dump(
                    mode="json", include=set(SamplingConfig.model_fields)
                ),
                "rank": self._rank * workers + worker,
                "ranks": self._ranks * workers,
                "settings": self._settings.model_dump(mode="json") | limits,
                "first_step": first_step,
                "steps": steps,
            }
            images = len(share_of_batch(config.global_batch, settings["rank"], settings["ranks"]))
            yield Worker(settings, (images, 3, config.image_px, config.image_px))

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


class Worker:
    """One worker, seen from its rank."""

    def __init__(self, settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        """Start a process with `settings` of JSON's types, for `serve_parts`, and the part's image
        shape [b, 3, S, S]; its first parts are made at once."""
        memory = os.memfd_create("evaclip-images")
        os.ftruncate(memory, SLOTS * int(np.prod(shape)))
        try:
            self._process = subprocess.Popen(
                WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[memory]
            )
            self._slots = _allocate_slots(memory, shape)
        finally:
            os.close(memory)
        self._taken = 0
        sent = json.dumps({"memory": memory, "shape": shape, **settings})
        self._send_message(sent.encode() + b"\n" + _GO * SLOTS)

    def receive_part(self) -> Part:
        """The next step's part, once it is there; raises InputError as the reader would, and
        WorkerFailed."""
        if self._taken:
            self._send_message(_GO)  # the slot of the part before is free again
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise WorkerFailed(f"a reading process ended with status {self._process.wait()}")
        said = json.loads(line)
        if "error" in said:
            raise InputError(said["error"])
        images = self._slots[self._taken % SLOTS]
        self._taken += 1
        origins = [Origin(*origin) for origin in said["origins"]]
        return Part(images, said["captions"], origins, said["bad"])

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send_message(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(
                f"a reading process ended with status {self._process.wait()}"
            ) from None


def serve_parts() -> int:
    """Be a worker: make parts of the batches that its rank's settings ask for, as fast as there is
    room; returns the exit code."""
    # Ctrl-C and a launcher's SIGTERM reach the whole group; the rank still saves a checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not an answer
    torch.set_num_threads(1)
    sent = json.loads(sys.stdin.buffer.readline())
    slots = _allocate_slots(sent["memory"], sent["shape"])

    def send_answer(**said: Any) -> None:
        answers.write(json.dumps(said).encode() + b"\n")
        answers.flush()

    try:
        reader = BatchReader(
            sent["shards"],
            SamplingConfig(**sent["sampling"]),
            rank=sent["rank"],
            ranks=sent["ranks"],
            settings=ReadSettings(**sent["settings"]),
        )
        with closing(reader):
            batches = reader.iterate_batches(sent["first_step"], sent["steps"])
            for number, batch in enumerate(batches):
                bad = dict(reader.bad)
                reader.bad.clear()
                if not sys.stdin.buffer.read(1):
                    break
                slots[number % SLOTS].copy_(batch.images)
                send_answer(captions=batch.captions, origins=batch.origins, bad=bad)
    except InputError as error:
        send_answer(error=str(error))
    except BrokenPipeError:
        pass  # the rank is gone
    return 0


def _allocate_slots(memory: int, shape: Sequence[int]) -> list[Tensor]:
    """Tensors of a shape [b, 3, S, S] in shared memory, where the channels come last."""
    images, channels, height, width = shape
    size = int(np.prod(shape))
    mapped = mmap.mmap(memory, SLOTS * size)
    return [
        torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=number * size)
        .view(images, height, width, channels)
        .permute(0, 3, 1, 2)
        for number in range(SLOTS)
    ]


if __name__ == "__main__":
    sys.exit(serve_parts())
