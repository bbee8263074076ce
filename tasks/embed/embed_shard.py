"""One rank of the stage: encode the samples of each `ranks`-th missing shard, and write a file a
shard beside its place: `python -m tasks.embed.embed_shard JOB.json RANK`.

The model sees chunks of one size (tasks/encoders/encode_chunks.py), so that a feature
depends on its sample alone, whatever rank made it. Images are decoded as for an evaluation.
"""

import sys
from collections.abc import Iterator, Set
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from evaclip_model.choices import Precision
from evaclip_model.config import Config
from evaclip_model.files import replace_file
from evaclip_model.reading.image_decoder import decode_image
from evaclip_model.reading.samples import Sample, SampleReader
from evaclip_model.reading.shard_store import ShardStore
from tasks.encoders.encode_chunks import IMAGE_CHUNK, embed_images, embed_texts
from tasks.encoders.open_models import Subject, open_subject
from tasks.index.sample_index import SampleIndex, ShardVerdict, read_verdicts
from tasks.process.ranks import run_share

READ_AT_ONCE = 16 * IMAGE_CHUNK
"""Samples in memory at the same time."""
CACHE_BYTES = 8 << 30
"""Room for shards that lie at URLs."""


class EmbedJob(Config):
    """The work of the ranks."""

    model: str
    precision: Precision
    device: str
    verified: Path
    folder: Path
    """Of the features."""
    shards: tuple[int, ...]
    """Numbers of the missing ones."""
    ranks: int


def embed_share(job: EmbedJob, rank: int) -> None:
    """Encode this rank's shards; InputError if the model cannot be opened, its features are not
    finite, or a shard changed."""
    torch.set_num_threads(1)
    subject = open_subject(job.model, device=job.device, precision=job.precision)
    verdicts = read_verdicts(job.verified)
    index = SampleIndex(job.verified)
    cache = job.folder.parent / f".cache-{rank}"
    mine = job.shards[rank :: job.ranks]
    with closing(ShardStore(str(job.verified), cache, CACHE_BYTES)) as store:
        for number in mine:
            verdict = verdicts[number]
            table = _embed_shard(subject, store, index, number, verdict)
            target = job.folder / f"{number:06d}.parquet"
            with replace_file(target) as beside:
                pq.write_table(table, beside, compression="zstd")


def _embed_shard(
    subject: Subject, store: ShardStore, index: SampleIndex, number: int, verdict: ShardVerdict
) -> pa.Table:
    """The features of a shard's usable samples."""
    assert verdict.shard is not None
    known = index.rows_of_shard(number, "place", "uid", "flaw")
    usable = known.filter(known["flaw"].is_null())
    places = usable["place"].to_numpy()
    images, texts = [], []
    with closing(store.open_shard(verdict.shard)) as reader:
        for pairs in _read_pairs(reader, verdict.stored, set(places.tolist())):
            images.append(
                embed_images(subject, (subject.transform(decode_image(p.image)) for p in pairs))
            )
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


def _read_pairs(reader: SampleReader, stored: int, usable: Set[int]) -> Iterator[list[Sample]]:
    """The usable samples of a shard, some at a time, in stored order."""
    for start in range(0, stored, READ_AT_ONCE):
        pairs = reader.read(start, start + READ_AT_ONCE)
        chosen = [pair for place, pair in enumerate(pairs, start) if place in usable]
        if chosen:
            yield chosen


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
