"""How many images a core reads, decodes and crops for training, beside open_clip's own loader.

    python tests/benchmarks/bench_loader.py [--images 4096] [--rounds 3] [--px 224] [--workers 0]

Covers: the same shards of photograph-like JPEGs, in the four sizes that collections are stored in,
read by open_clip's webdataset pipeline with its training transform and by this project's reader,
sides alternating in one run; and what decoding alone would allow. Prints Markdown.
Not here: whether the pixels are right (tests/evaclip_model/test_decode.py); tokens, which open_clip
makes in its loader and this project elsewhere: open_clip's tokenizer is replaced by one that costs
nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from webdataset import tariterators

from evaclip_model.reading.reader import BatchReader, ReadSettings
from evaclip_model.reading.samples import SampleReader, Shard, ShardManifest
from evaclip_model.reading.transform import decode_fast, normalize_images, train_crop
from evaclip_model.training.config import TrainConfig
from tests.evaclip_model.peer_libraries import open_clip

STORED = ((800, 600, 88), (512, 384, 95), (341, 256, 95), (299, 224, 95))
"""Width, height and JPEG quality, as collections are stored."""
DIFFERENT = 64
"""Different pictures of each size; making one costs more than reading it a hundred times."""
BATCH = 64
SHARDS = 4
SCALE = (0.9, 1.0)
SHUFFLED = 256


@dataclass(frozen=True)
class Cost:
    """Of one pass over all images."""

    images: int
    cpu_s: float
    wall_s: float


def photographs(width: int, height: int, quality: int) -> list[bytes]:
    """JPEGs of noise that falls with frequency as a photograph's does, in related colours."""
    rng = np.random.default_rng(width)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1

    def field(falling: float) -> np.ndarray:
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**falling
        made = np.fft.irfft2(spectrum, s=(height, width))
        return made / made.std()

    found = []
    for _ in range(DIFFERENT):
        grey = field(1.45)
        pixels = np.stack([grey + 0.3 * field(1.6) for _ in range(3)], axis=-1) * 46 + 118
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
        found.append(file.getvalue())
    return found


def write_shards(
    folder: Path, pictures: list[bytes], images: int, captions: Sequence[str] = ("a caption",)
) -> Path:
    """Shards as img2dataset writes them, pictures and captions in turn; the manifest's path."""
    shards = []
    for number in range(SHARDS):
        path = folder / f"{number:05d}.tar"
        with webdataset.TarWriter(str(path)) as tar:
            for place in range(images // SHARDS):
                key = f"{number:05d}{place:04d}"
                record = {"uid": key, "source": "a", "url": f"http://x/{key}", "status": "success"}
                sample = {"__key__": key, "jpg": pictures[place % len(pictures)]}
                caption = captions[(number * (images // SHARDS) + place) % len(captions)]
                tar.write({**sample, "txt": caption, "json": json.dumps(record)})
        size = path.stat().st_size
        samples = images // SHARDS
        shards.append(
            Shard(path=path.name, source="a", samples=samples, bytes=size, sha256="0" * 64)
        )
    manifest = folder / "shards.json"
    ShardManifest(shards=tuple(shards)).write(manifest)
    return manifest


def counted(batches: Iterator[int], *, after_the_first: bool) -> Cost:
    """Drain an iterator of numbers of images, with or without the time to its first."""
    if after_the_first:
        next(batches)
    cpu, wall = time.process_time(), time.perf_counter()
    images = sum(batches)
    return Cost(images, time.process_time() - cpu, time.perf_counter() - wall)


def by_open_clip(manifest: Path, images: int, px: int, workers: int) -> Iterator[int]:
    from open_clip_train import data as loader  # only once peer_libraries is imported

    # It was written for a webdataset that put no empty entry behind a tar's last member.
    loader.tar_file_expander = partial(tariterators.tar_file_expander, eof_value=None)
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=px),
        is_train=True,
        aug_cfg=open_clip.transform.AugmentationCfg(scale=SCALE),
    )
    settings = Namespace(
        train_data=f"{manifest.parent}/{{00000..{SHARDS - 1:05d}}}.tar",
        train_num_samples=images,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
    )
    nothing = torch.zeros(1, 1, dtype=torch.long)
    data = loader.get_wds_dataset(
        settings, transform, is_train=True, tokenizer=lambda text: nothing
    )
    for batch, _ in data.dataloader:
        yield len(batch)


def by_reader(
    manifest: Path, images: int, px: int, workers: int, *, decode: str, normalise: bool
) -> Iterator[int]:
    config = TrainConfig(
        name="bench",
        image_px=px,
        samples_seen=images,
        global_batch=BATCH,
        lanes=SHARDS,
        shuffle_buffer=SHUFFLED,
        crop_scale=SCALE,
        decode=decode,
    )
    settings = ReadSettings(workers=workers)
    with closing(BatchReader(manifest, config, rank=0, ranks=1, settings=settings)) as reader:
        for batch in reader.iterate_batches(0, config.steps):
            yield len(normalize_images(batch.images) if normalise else batch.images)


def by_decoding(manifest: Path, images: int, px: int, *, crop: bool) -> Iterator[int]:
    for number in range(SHARDS):
        path = manifest.parent / f"{number:05d}.tar"
        with closing(SampleReader(path)) as pairs:
            encoded = [pair.image for pair in pairs.read(0, images // SHARDS)]
        for position, image in enumerate(encoded):
            if crop:
                train_crop(decode_fast(image), px, seed=0, position=position, scale=SCALE)
            else:
                simplejpeg.decode_jpeg(image)
            yield 1


def sides(manifest: Path, images: int, px: int, workers: int) -> dict[str, Callable[[], Cost]]:
    """Name -> one pass; workers are started once a training, so their start does not count."""
    started = workers > 0
    given = (manifest, images, px)

    def ours(decode: str, normalise: bool) -> Callable[[], Cost]:
        return lambda: counted(
            by_reader(*given, workers, decode=decode, normalise=normalise), after_the_first=started
        )

    def limit(crop: bool) -> Callable[[], Cost]:
        return lambda: counted(by_decoding(*given, crop=crop), after_the_first=False)

    return {
        "open_clip": lambda: counted(by_open_clip(*given, workers), after_the_first=started),
        "reference": ours("reference", False),
        "fast": ours("fast", False),
        "fast, normalised here": ours("fast", True),
        "decode and crop only": limit(True),
        "decode only": limit(False),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--images", type=int, default=4096, help=f"a multiple of {BATCH * SHARDS}")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--px", type=int, default=224, help="side of the crops")
    options.add_argument("--workers", type=int, default=0, help="processes of a loader")
    chosen = options.parse_args()
    if chosen.images % (BATCH * SHARDS):
        options.error(f"--images must be a multiple of {BATCH * SHARDS}")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    # A worker's CPU time is not its parent's: with workers only the clock on the wall is fair.
    unit = "images/s" if chosen.workers else "images per CPU-second"
    names = list(sides(Path(), 0, 0, 0))
    print(f"{unit}, {chosen.px} px, median of {chosen.rounds} rounds, {chosen.workers} workers\n")
    print(f"| stored | KB | {' | '.join(names)} | fast / open_clip |")
    print("|---" * (len(names) + 3) + "|")
    for width, height, quality in STORED:
        pictures = photographs(width, height, quality)
        with tempfile.TemporaryDirectory() as folder:
            manifest = write_shards(Path(folder), pictures, chosen.images)
            measured: dict[str, list[float]] = {name: [] for name in names}
            compared = sides(manifest, chosen.images, chosen.px, chosen.workers)
            compared["open_clip"]()  # imports
            for _ in range(chosen.rounds):
                for name, run in compared.items():
                    cost = run()
                    spent = cost.wall_s if chosen.workers else cost.cpu_s
                    measured[name].append(cost.images / spent)
        rates = {name: statistics.median(found) for name, found in measured.items()}
        size = sum(map(len, pictures)) / len(pictures) / 1000
        figures = " | ".join(f"{rate:,.0f}" for rate in rates.values())
        ratio = rates["fast"] / rates["open_clip"]
        stored = f"{width}x{height} q{quality}"
        print(f"| {stored} | {size:.0f} | {figures} | **{ratio:.2f}** |", flush=True)


if __name__ == "__main__":
    main()
