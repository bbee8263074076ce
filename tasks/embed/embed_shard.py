"""One rank of the stage: encode the samples of each `ranks`-th missing shard, and write a file a
shard beside its place: `python -m tasks.embed.embed_shard JOB.json RANK`.

The model sees chunks of one size (tasks/encoders/encode_chunks.py), so that a feature
depends on its sample alone, whatever rank made it. Images are decoded as for an evaluation.
"""

import sys
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
    """The work of the ranks: the missing `shards` by number, into the `folder` of features."""

    model: str
    precision: Precision
    device: str
    verified: Path
    folder: Path
    shards: tuple[int, ...]
    ranks: int


def embed_share(job: EmbedJob, rank: int) -> None:
    """Encode this rank's shards; InputError if the model cannot be opened, its features are not
    finite, or a shard changed."""
    torch.set_num_threads(1)
    subject = open_subject(job.model, device=job.device, precision=job.precision)
    verdicts = read_verdicts(job.verified)
    index = SampleIndex(job.verified)
    cache = job.folder.parent / f".cache-{rank}"
    with closing(ShardStore(str(job.verified), cache, CACHE_BYTES)) as store:
        for number in job.shards[rank :: job.ranks]:
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
