"""Validation while training goes on: loss and retrieval on the pairs that the dataset holds out
(`dataset.validation_share`), which no step is shown.

Pairs are encoded in blocks of a fixed size, whole blocks by one rank, and every rank computes the
figures from all features: so they do not depend on the number of ranks. Nothing is drawn, and the
model stays as it is: training goes on as if there were no validation.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.reading.config import SamplingConfig
from evaclip_model.reading.reader import BatchReader, ReadSettings
from evaclip_model.reading.samples import VALIDATION_SHARDS, ShardManifest
from evaclip_model.reading.transform import normalize_images
from evaclip_model.reading.urls import resolve_location
from evaclip_model.tokenizer.tokenizer import tokenize
from evaclip_model.training.checkpoint.consensus import Peers
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.loss.objective import Objective
from evaclip_model.training.training_step import number_texts
from evaclip_model.zeroshot.exact_ranks import retrieve_images, retrieve_texts
from evaclip_model.zeroshot.statistics import hit_rate

BLOCK = 64
"""Pairs that are encoded at once."""
RECALLS = (1, 5)


@dataclass(frozen=True)
class HeldOutPairs:
    """Pairs that are held out, the same on every rank."""

    images: Tensor
    """[N, 3, S, S] uint8."""
    captions: tuple[str, ...]


def read_held_out(shards: Path | str, config: TrainConfig, settings: ReadSettings) -> HeldOutPairs:
    """Read at most `validation.samples` pairs, spread over the sources as they are, into memory.

    Args:
        shards: the training's manifest; that of the held-out pairs lies beside it.

    Raises: InputError: there is none, it has a single pair, or a shard cannot be read.
    """
    folder, _, _ = str(shards).rpartition("/")
    manifest = resolve_location(folder, VALIDATION_SHARDS)
    try:
        total = ShardManifest.read(manifest).samples
    except InputError as error:
        raise InputError(f"validation: {error}; set dataset.validation_share above 0") from None
    if total < 2:
        raise InputError("validation needs two pairs at least: raise dataset.validation_share")
    sampling = SamplingConfig(
        image_px=config.image_px,
        global_batch=min(total, config.validation.samples),
        crop_scale=(1.0, 1.0),
        decode=config.decode,
        lanes=1,
        seed=config.seed,
    )
    with closing(BatchReader(manifest, sampling, rank=0, ranks=1, settings=settings)) as reader:
        batch = reader.read_batch(0)
    # A pair stands in the place of one that cannot be read, and must not be its own negative.
    places = {origin: place for place, origin in enumerate(batch.origins)}
    kept = sorted(places.values())
    return HeldOutPairs(batch.images[kept], tuple(batch.captions[place] for place in kept))


@torch.no_grad()
def validate_model(
    model: EvaClip, pairs: HeldOutPairs, objective: Objective, config: TrainConfig
) -> dict[str, float]:
    """The objective's loss of all pairs as one batch, and the share of images (captions) whose own
    caption (image) is among the first 1 and 5 of all; nothing where features are not finite. Every
    rank calls it, and gets the same."""
    was_training = model.training
    model.eval()
    images, texts = _encode_pairs(model, pairs, config.caption_templates[0])
    captions = number_texts(pairs.captions) if config.same_caption != "negative" else None
    terms = objective.compute_terms(
        images,
        texts,
        objective.read_scalars(model),
        captions=None if captions is None else captions.to(images.device),
        is_whole_batch=True,
    )
    model.train(was_training)
    if not (images.isfinite().all() and texts.isfinite().all()):
        return {}  # a logit that is not finite would rank every answer first
    own = torch.arange(len(images))
    images, texts = images.cpu(), texts.cpu()
    ranks = {
        "image_to_text": retrieve_texts(images, texts, own).ranks,
        "text_to_image": retrieve_images(images, texts, own).ranks,
    }
    return {
        "validation_loss": float(terms.loss),
        **{
            f"validation_{direction}_r{k}": hit_rate(found, k)
            for direction, found in ranks.items()
            for k in RECALLS
        },
    }


def _encode_pairs(model: EvaClip, pairs: HeldOutPairs, template: str) -> tuple[Tensor, Tensor]:
    """Unit features [N, E] of images and captions, the same on every rank."""
    weight = model.logit_scale
    tokens = tokenize(
        [template.replace("{}", caption) for caption in pairs.captions],
        model.config.text.context_length,
    )

    def encode_images(some: slice) -> Tensor:
        pixels = normalize_images(pairs.images[some].to(weight.device)).to(weight.dtype)
        return model.encode_image(pixels, normalize=True)

    return (
        encode_in_blocks(model, len(tokens), encode_images),
        encode_in_blocks(
            model, len(tokens), lambda some: model.encode_text(tokens[some], normalize=True)
        ),
    )


def encode_in_blocks(
    model: EvaClip, count: int, encode: Callable[[slice], Tensor], block: int = BLOCK
) -> Tensor:
    """Features [count, E] in fp32, the same on every rank: each block of inputs is encoded by one
    rank, and told to all."""
    peers = Peers.every_rank()
    features = torch.zeros(count, model.config.embed_dim, device=model.logit_scale.device)
    for first in range(peers.rank * block, count, peers.count * block):
        some = slice(first, first + block)
        features[some] = encode(some)
    if peers.count > 1:
        dist.all_reduce(features)
    return features
