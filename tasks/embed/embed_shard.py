"""One rank of a stage: encode the samples of each `ranks`-th missing shard, or what an equal run of
missing files of a stream is to hold, and write each beside its place:
`python -m tasks.embed.embed_shard JOB.json RANK`.

The model sees chunks of one size (tasks/encoders/encode_chunks.py), so that a feature
depends on its sample alone, whatever rank made it. Images are decoded as for an evaluation.
"""

import sys
from collections.abc import Iterator
from contextlib import closing
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
from evaclip_model.reading.reader import BatchReader, ReadSettings
from evaclip_model.reading.samples import SHARDS
from evaclip_model.reading.shard_store import ShardStore
from evaclip_model.reading.teacher_features import steps_in_file, stream_file
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.training_step import vary_caption
from tasks.encoders.encode_chunks import IMAGE_CHUNK, embed_images, embed_texts
from tasks.encoders.open_models import Subject, open_subject
from tasks.index.sample_index import SampleIndex, ShardVerdict, read_verdicts
from tasks.process.ranks import run_share

READ_AT_ONCE = 16 * IMAGE_CHUNK
"""Samples in memory at the same time."""
CACHE_BYTES = 8 << 30
"""Room for shards that lie at URLs."""


class EmbedJob(Config):
    """The work of the ranks: the missing `files` by number, into the `folder` of features."""

    model: str
    precision: Precision
    device: str
    data: Path
    """A verification; of a stream, a dataset version."""
    stream: TrainConfig | None = None
    """The training stage that shows what is encoded; none: all usable samples as they are."""
    folder: Path
    files: tuple[int, ...] = ()
    ranks: int = 1


def embed_share(job: EmbedJob, rank: int) -> None:
    """Encode this rank's share; InputError if the model cannot be opened, its features are not
    finite, or a shard changed."""
    torch.set_num_threads(1)
    subject = open_subject(job.model, device=job.device, precision=job.precision)
    cache = job.folder.parent / f".cache-{rank}"
    if job.stream is not None:
        _embed_stream(subject, job, job.stream, rank, cache)
        return
    verdicts = read_verdicts(job.data)
    index = SampleIndex(job.data)
    with closing(ShardStore(str(job.data), cache, CACHE_BYTES)) as store:
        for number in job.files[rank :: job.ranks]:
            table = _embed_shard(subject, store, index, number, verdicts[number])
            with replace_file(job.folder / f"{number:06d}.parquet") as beside:
                pq.write_table(table, beside, compression="zstd")


def _embed_shard(
    subject: Subject, store: ShardStore, index: SampleIndex, number: int, verdict: ShardVerdict
) -> pa.Table:
    """The features of a shard's usable samples, in stored order."""
    assert verdict.shard is not None
    known = index.rows_of_shard(number, "place", "uid", "flaw")
    usable = known.filter(known["flaw"].is_null())
    places = usable["place"].to_numpy()
    wanted, images, texts = set(places.tolist()), [], []
    with closing(store.open_shard(verdict.shard)) as reader:
        for start in range(0, verdict.stored, READ_AT_ONCE):
            read = enumerate(reader.read(start, start + READ_AT_ONCE), start)
            if pairs := [pair for place, pair in read if place in wanted]:
                pixels = (subject.transform(decode_image(pair.image)) for pair in pairs)
                images.append(embed_images(subject, pixels))
                texts.append(embed_texts(subject, [pair.caption for pair in pairs]))
    image, text = torch.cat(images), torch.cat(texts)
    similarity = (image * text).sum(dim=1)
    return pa.table(
        {
            "place": pa.array(places, pa.int32()),
            "uid": usable["uid"],
            "image": _halves(image),
            "text": _halves(text),
            "similarity": pa.array(similarity.numpy(), pa.float32()),
        }
    )


def _embed_stream(
    subject: Subject, job: EmbedJob, train: TrainConfig, rank: int, cache: Path
) -> None:
    """Read as the trainer does, all lanes, and each crop at the model's size."""
    size = subject.transform(Image.new("RGB", (8, 8))).shape[-1]
    reader = BatchReader(
        job.data / SHARDS,
        train.model_copy(update={"image_px": size}),
        rank=0,
        ranks=1,
        settings=ReadSettings(shard_cache=cache, shard_cache_bytes=CACHE_BYTES),
    )
    with closing(reader):
        for number in np.array_split(job.files, job.ranks)[rank].tolist():
            captions: list[str] = []
            images = embed_images(subject, _show_file(subject, reader, train, number, captions))
            features = torch.stack([images, embed_texts(subject, captions)], dim=1)
            with replace_file(stream_file(job.folder, number)) as beside, beside.open("wb") as file:
                np.save(file, features.numpy().astype(np.float16), allow_pickle=False)


def _show_file(
    subject: Subject, reader: BatchReader, train: TrainConfig, number: int, captions: list[str]
) -> Iterator[Tensor]:
    """The crops of a file's steps as the model takes them; captions as shown go to `captions`."""
    first = number * steps_in_file(train.global_batch)
    last = min(first + steps_in_file(train.global_batch), train.steps)
    for batch in reader.iterate_batches(first, last):
        shown = zip(batch.captions, batch.positions.tolist(), strict=True)
        captions += [vary_caption(text, train, position) for text, position in shown]
        for pixels in batch.images.permute(0, 2, 3, 1).numpy():
            yield subject.transform(Image.fromarray(pixels))


def _halves(features: Tensor) -> pa.FixedSizeListArray:
    """Features [N, D] as a column of float16 lists."""
    flat = pa.array(features.numpy().astype(np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, features.shape[1])


if __name__ == "__main__":
    sys.exit(
        run_share(
            lambda path, rank: embed_share(EmbedJob.model_validate_json(path.read_text()), rank)
        )
    )
