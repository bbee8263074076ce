"""img2dataset's downloader with our fetching, our decoding and our order of samples.

Imports img2dataset, which takes seconds and 0.8 GB: only the worker may import this.
"""

import heapq
import importlib
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from img2dataset.downloader import Downloader
from img2dataset.resizer import ResizeMode, Resizer
from img2dataset.writer import WebDatasetSampleWriter
from PIL import Image

from evaclip_model.reading import image_decoder
from evaclip_model.reading.samples import BrokenShard
from tasks.download.config import DownloadConfig
from tasks.download.fetch import Fetcher
from tasks.download.fetch_outcome import REFUSALS, Outcome, outcome_of
from tasks.download.shards import Ledger, PlannedShard, hash_column_of, verdict_file
from tasks.download.watch_progress import OutcomeCounter

_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
"""`encode_format` -> Pillow's name of it."""


class HardenedDownloader(Downloader):
    """Fetches with our fetcher, counts every URL, writes shards that can be repeated."""

    def __init__(self, *, config: DownloadConfig, counters: Path, **options: Any) -> None:
        resizer = BoundedResizer(options["resizer"], config)
        super().__init__(**{**options, "sample_writer_class": OrderedWriter, "resizer": resizer})
        self._config = config
        self._counters = counters

    def __call__(self, row: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
        # Here and not where the worker is started: executors elsewhere have another environment.
        os.environ["RES_OPTIONS"] = "timeout:3 attempts:2"
        shard, rows_file = row
        fetcher = Fetcher(self._config)
        with open(rows_file, "rb") as file:
            rows = pa.ipc.open_file(file).read_all()
        digests = _expected_hashes(rows, self._config)
        with OutcomeCounter(self._counters, shard) as counter:
            # img2dataset looks this name up in its module for every URL; there is no other way
            # in. importlib, because a package's attribute of a module's name may be a function.
            module: Any = importlib.import_module("img2dataset.downloader")
            module.download_image_with_retry = partial(_fetch_row, fetcher, digests, counter)
            done: tuple[bool, tuple[int, str]] = super().__call__(row)
            planned = PlannedShard(shard, rows["source"][0].as_py(), rows.num_rows)
            with suppress(BrokenShard):  # whoever counts shards finds it again
                # Here, because whoever counts the shards of hundreds of machines cannot open them.
                verdict = Ledger(verdict_file(self._counters, shard), Path(self.output_folder))
                verdict.check_planned(planned)
        return done


def _expected_hashes(rows: pa.Table, config: DownloadConfig) -> Sequence[str | None]:
    """The hash of every row of a shard, as img2dataset laid them out; nothing if none is wanted."""
    if not config.hash_column:
        return ()
    name = hash_column_of(rows.column_names, config)
    values: list[str | None] = rows[name].to_pylist()
    return values


def _fetch_row(
    fetcher: Fetcher,
    digests: Sequence[str | None],
    counter: OutcomeCounter,
    row: tuple[int, str],
    **_: object,
) -> tuple[int, io.BytesIO | None, str | None]:
    """Fetch a row (its place, URL) as img2dataset calls it, with options the fetcher knows."""
    place, url = row
    body, message = fetcher.fetch_image(url, digests[place] if digests else None)
    outcome = outcome_of("success" if message is None else "failed", message)
    counter.count_outcome(outcome, len(body or b""))
    return place, None if body is None else io.BytesIO(body), message


class BoundedResizer:
    """Decodes within the limits of `image_decoder`; img2dataset resizes and encodes.

    img2dataset's own way is OpenCV, which has no limit but one on pixels from the environment,
    passes over damage, ignores the orientation and saturates 16 bits. Images are stored upright,
    with 8 bits a channel, transparent parts on white.
    """

    def __init__(self, resizer: Resizer, config: DownloadConfig) -> None:
        self._resizer = resizer
        self._config = config

    def __call__(self, stream: io.BytesIO, _: object = None) -> tuple[Any, ...]:
        """The bytes to store, their width and height, those of the original, None; or five times
        None and why nothing is stored."""
        data = stream.getvalue()
        try:
            decoded = image_decoder.decode_undamaged_image(data, self._config.max_pixels)
            unwanted = self._unwanted_size(*decoded.image.size)
            if unwanted is not None:
                return (*[None] * 5, unwanted)
            if self._keeps_bytes(decoded):
                return (data, *decoded.image.size, *decoded.image.size, None)
            pixels = _encode_netpbm(decoded.image)
            del decoded  # 4 bytes a pixel
        except Exception as error:  # one image must not end the shard
            reason = REFUSALS[Outcome(getattr(error, "word", Outcome.UNDECODABLE))]
            return (*[None] * 5, f"{reason} ({error})")
        stored: tuple[Any, ...] = self._resizer(io.BytesIO(pixels))
        return stored

    def _unwanted_size(self, width: int, height: int) -> str | None:
        shorter, longer = sorted((width, height))
        if shorter < self._config.min_image_px:
            return REFUSALS[Outcome.TOO_SMALL]
        is_long = longer / shorter > self._config.max_aspect_ratio
        return REFUSALS[Outcome.ASPECT_RATIO] if is_long else None

    def _keeps_bytes(self, decoded: image_decoder.DecodedImage) -> bool:
        """Tell whether the original file is stored: it has the format, the size and the look."""
        config, image, mode = self._config, decoded.image, self._resizer.resize_mode
        longer_counts = mode in (ResizeMode.border, ResizeMode.keep_ratio_largest)
        side = max(image.size) if longer_counts else min(image.size)
        is_resized = side > config.image_px or not config.storage.resize_only_if_bigger
        return (
            config.storage.skip_reencode
            and decoded.format == _FORMATS[config.storage.encode_format]
            and not (is_resized and mode != ResizeMode.no)
            and not decoded.is_changed
            and not image.has_transparency_data
        )


def _encode_netpbm(image: Image.Image) -> bytes:
    """The image as a file without compression, in which OpenCV finds these very pixels."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba)
        del rgba
    is_grey = image.mode in ("1", "L")
    image = image.convert("L" if is_grey else "RGB")
    kind = "P5" if is_grey else "P6"
    return f"{kind} {image.width} {image.height} 255\n".encode() + image.tobytes()


class OrderedWriter(WebDatasetSampleWriter):
    """Writes a shard in the order of its rows, not of the network, and without clock times.

    The same answers then give the same bytes, whatever was interrupted or slow; training that
    reads them repeats exactly. Samples that overtook a slow one wait here in memory.
    """

    def __init__(self, *options: Any) -> None:
        super().__init__(*options)
        self.tarwriter.mtime = 0
        self._next: int | None = None
        self._waiting: list[tuple[int, tuple[Any, ...]]] = []

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: Any) -> None:
        if self._next is None:
            self._next = self.shard_id * 10 ** (len(key) - self.oom_shard_count)
        heapq.heappush(self._waiting, (int(key), (img_str, key, caption, meta)))
        while self._waiting and self._waiting[0][0] == self._next:
            super().write(*heapq.heappop(self._waiting)[1])
            self._next += 1

    def close(self) -> None:
        while self._waiting:
            super().write(*heapq.heappop(self._waiting)[1])
        super().close()
