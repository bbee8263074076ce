"""One rank of a stage: encode the samples of each `ranks`-th missing shard, or of an equal share of
a stream's missing files, and write each file beside its place:
`python -m tasks.embed.embed_shard JOB.json`.

The model sees chunks of one size (evaclip_model/zeroshot/encode_chunks.py), so that a feature
depends on its sample alone, whatever rank made it. Images are decoded as for an evaluation.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, nullcontext
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from evaclip_model.choices import Precision
from evaclip_model.config import Config
from evaclip_model.files import replace_file
from evaclip_model.reading.image_decoder import decode_image
from evaclip_model.reading.reader import Batch, BatchReader, ReadSettings
from evaclip_model.reading.samples import SHARDS
from evaclip_model.reading.shard_store import ShardStore
from evaclip_model.reading.teacher_features import split_stream, stream_file
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.cost import pair_flops, peak_flops
from evaclip_model.training.training_step import vary_caption
from evaclip_model.zeroshot import encode_chunks as encoding
from evaclip_model.zeroshot.embed_files import feature_columns
from tasks.encoders.open_models import count_workers, device_of, open_subject
from tasks.index.sample_index import SampleIndex, ShardVerdict, read_verdicts
from tasks.process.launch import RankState, run_share

READ_AT_ONCE = 16 * encoding.IMAGE_CHUNK
"""Samples in memory at the same time."""
CACHE_BYTES = 8 << 30
"""Room for shards that lie at URLs."""


class EmbedJob(Config):
    """The work of the ranks: the missing `files` by number, into the `folder` of features."""

    model: str
    precision: Precision
    device: str
    data: Path
    """A verification, a file a shard; of a stream, a dataset version."""
    stream: TrainConfig | None = None
    """The training stage that shows what is encoded; none: all usable samples as they are."""
    folder: Path
    files: tuple[int, ...] = ()
    workers: int | None
    """Decoding threads of each rank; None: the cores that its machine's GPUs leave."""


def embed_share(
    job: EmbedJob, rank: int, ranks: int, say: Callable[[RankState], None] = lambda said: None
) -> None:
    """Encode this rank's share, and `say` how far that is; InputError if the model cannot be
    opened, its features are not finite, or a shard changed."""
    mine, done = job.files[rank::ranks], 0
    if not mine:
        return
    device, workers = device_of(job.device, rank), count_workers(job.workers, job.device)
    cache = job.folder.parent / f".cache-{rank}"
    with (
        encoding.exact_arithmetic(job.device),
        ThreadPoolExecutor(workers, "decode") if workers else nullcontext() as pool,
    ):
        subject = open_subject(job.model, device=device, precision=job.precision)
        least_s, begin_s = seconds_at_peak(subject, device), time.monotonic()
        say(RankState())

        def count(samples: int) -> None:
            nonlocal done
            done += samples
            share = done * least_s / (time.monotonic() - begin_s) if least_s else None
            say(RankState(done=done, share_of_peak=share))

        if job.stream is not None:
            read = ReadSettings(workers=workers, shard_cache=cache, shard_cache_bytes=CACHE_BYTES)
            for run in share_runs(job.files, split_stream(job.stream)[1], rank, ranks):
                _embed_run(subject, job, job.stream, run, read, pool, count)
            return
        verdicts, index = read_verdicts(job.data), SampleIndex(job.data)
        with closing(ShardStore(str(job.data), cache, CACHE_BYTES)) as store:
            for number in mine:
                table = _embed_shard(subject, store, index, number, verdicts[number], pool, count)
                with replace_file(job.folder / f"{number:06d}.parquet") as beside:
                    pq.write_table(table, beside, compression="zstd")


def seconds_at_peak(subject: encoding.Subject, device: str) -> float | None:
    """Seconds that a pair would take if the device computed at the speed that its maker states, as
    training's MFU is meant; None where that is not known: of CPUs, and of other libraries' models.
    """
    peak = peak_flops(torch.cuda.get_device_name(device)) if device != "cpu" else None
    if peak is None or not isinstance(subject, encoding.EvaSubject):
        return None
    return pair_flops(subject.config) / peak


def _embed_shard(
    subject: encoding.Subject,
    store: ShardStore,
    index: SampleIndex,
    number: int,
    verdict: ShardVerdict,
    pool: Executor | None,
    count: Callable[[int], None],
) -> pa.Table:
    """The features of a shard's usable samples, in stored order; `count` is told of each batch of
    stored ones."""

    def load(image: bytes | memoryview) -> Tensor:
        return subject.transform(decode_image(image))

    assert verdict.shard is not None
    usable = usable_rows(index, number)
    wanted, images, texts = set(usable["place"].to_pylist()), [], []
    with closing(store.open_shard(verdict.shard)) as reader:
        for start in range(0, verdict.stored, READ_AT_ONCE):
            read = enumerate(reader.read(start, start + READ_AT_ONCE), start)
            if pairs := [pair for place, pair in read if place in wanted]:
                decoded = (pool.map if pool else map)(load, [pair.image for pair in pairs])
                images.append(encoding.embed_images(subject, decoded))
                texts.append(encoding.embed_texts(subject, [pair.caption for pair in pairs]))
            count(min(READ_AT_ONCE, verdict.stored - start))
    features = feature_columns(torch.cat(images), torch.cat(texts))
    return pa.table({**dict(zip(usable.column_names, usable.columns, strict=True)), **features})


def usable_rows(index: SampleIndex, number: int) -> pa.Table:
    """(place, int32; uid) of a shard's samples without a flaw, in stored order."""
    known = index.rows_of_shard(number, "place", "uid", "flaw")
    usable = known.filter(known["flaw"].is_null())
    return pa.table({"place": usable["place"].cast(pa.int32()), "uid": usable["uid"]})


def share_runs(files: Sequence[int], groups: int, rank: int, ranks: int) -> Iterator[Sequence[int]]:
    """A rank's files of a stream, in runs that follow each other in one of its groups of lanes."""
    by_group = sorted(files, key=lambda number: (number % groups, number))
    mine = enumerate(np.array_split(by_group, ranks)[rank].tolist())
    for _, run in groupby(mine, lambda one: (one[1] % groups, one[1] // groups - one[0])):
        yield [number for _, number in run]


def _embed_run(
    subject: encoding.Subject,
    job: EmbedJob,
    train: TrainConfig,
    run: Sequence[int],
    reading: ReadSettings,
    pool: Executor | None,
    count: Callable[[int], None],
) -> None:
    """Write a run of a stream's files: read as the trainer does, each crop at the model's size."""
    steps, groups = split_stream(train)
    size = {"image_px": subject.transform(Image.new("RGB", (8, 8))).shape[-1]}
    captions: list[str] = []

    def load(pixels: np.ndarray) -> Tensor:
        return subject.transform(Image.fromarray(pixels))

    def show(batches: Iterable[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            shown = zip(batch.captions, batch.positions.tolist(), strict=True)
            captions.extend(vary_caption(text, train, position) for text, position in shown)
            pixels = batch.images.permute(0, 2, 3, 1).numpy()
            for start in range(0, len(pixels), READ_AT_ONCE):
                part = pixels[start : start + READ_AT_ONCE]
                yield from (pool.map if pool else map)(load, part)
                count(len(part))

    shards, stream = job.data / SHARDS, train.model_copy(update=size)
    reader = BatchReader(shards, stream, rank=run[0] % groups, ranks=groups, settings=reading)
    first, last = run[0] // groups * steps, min((run[-1] // groups + 1) * steps, train.steps)
    with closing(reader), closing(reader.iterate_batches(first, last)) as batches:
        for number in run:
            images = encoding.embed_images(subject, show(islice(batches, steps)))
            features = torch.stack([images, encoding.embed_texts(subject, captions)], dim=1)
            with replace_file(stream_file(job.folder, number)) as beside, beside.open("wb") as file:
                np.save(file, features.numpy().astype(np.float16), allow_pickle=False)
            captions.clear()


if __name__ == "__main__":
    sys.exit(run_share(EmbedJob, embed_share))
