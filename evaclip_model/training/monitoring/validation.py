"""Evaluation while training goes on: loss and retrieval on the pairs that the dataset holds out
(`dataset.validation_share`), which no step is shown; and a probe, zero-shot classification of a
small set (zeroshot/set_layout.py: an image and `KEY.cls` a sample). Evaluation proper is
tasks/evaluate.

What is encoded comes in blocks of a fixed size, whole blocks by one rank, and every rank computes
the figures from all features: they do not depend on the number of ranks, and no rank ends or goes
on alone. Nothing is drawn, and the model stays as it is.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.reading.config import SamplingConfig
from evaclip_model.reading.image_decoder import UnreadableImageError, decode_image
from evaclip_model.reading.reader import BatchReader, ReadSettings
from evaclip_model.reading.samples import VALIDATION_SHARDS, ShardManifest
from evaclip_model.reading.transform import image_transform, normalize_images
from evaclip_model.reading.urls import resolve_location
from evaclip_model.tokenizer.tokenizer import tokenize
from evaclip_model.training.checkpoint.consensus import Peers
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.loss.objective import Objective
from evaclip_model.training.training_step import number_pairs
from evaclip_model.zeroshot import exact_ranks, set_layout
from evaclip_model.zeroshot.imagenet_prompts import PLACEHOLDER
from evaclip_model.zeroshot.statistics import count_hits, hit_rate

BLOCK = 64
"""Images or pairs that are encoded at once."""
PROMPTS_BLOCK = 256
_log = logging.getLogger(__name__)


class HeldOutPairs(NamedTuple):
    """Pairs that are held out, the same on every rank; images [N, 3, S, S] uint8, and what
    `number_pairs` says of them."""

    images: Tensor
    captions: tuple[str, ...]
    numbers: Tensor


def read_held_out(shards: Path | str, config: TrainConfig, settings: ReadSettings) -> HeldOutPairs:
    """Read at most `validation.samples` pairs, spread over the sources as they are, into memory;
    their manifest lies beside `shards`, the training's. Raises InputError when there is none, it
    has a single pair, or a shard cannot be read."""
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
    captions = tuple(batch.captions[place] for place in kept)
    numbers = number_pairs(captions, [batch.origins[place] for place in kept])
    return HeldOutPairs(batch.images[kept], captions, numbers)


@torch.no_grad()
def validate_model(
    model: EvaClip, pairs: HeldOutPairs, objective: Objective, config: TrainConfig
) -> dict[str, float]:
    """The objective's loss of all pairs as one batch, and the share of images (captions) whose own
    caption (image) is among the first 1 and 5 of all; nothing where features are not finite. Every
    rank calls it, and gets the same."""
    was_training = model.training
    model.eval()
    weight, template = model.logit_scale, config.caption_templates[0]

    def encode_images(some: slice) -> Tensor:
        pixels = normalize_images(pairs.images[some].to(weight.device)).to(weight.dtype)
        return model.encode_image(pixels, normalize=True)

    images = encode_in_blocks(model, len(pairs.images), encode_images)
    texts = _encode_texts(model, [template.replace("{}", text) for text in pairs.captions])
    captions = pairs.numbers.to(images.device) if config.same_caption != "negative" else None
    terms = objective.compute_terms(
        images, texts, objective.read_scalars(model), captions=captions, is_whole_batch=True
    )
    model.train(was_training)
    if not (images.isfinite().all() and texts.isfinite().all()):
        return {}  # a logit that is not finite would rank every answer first
    own = torch.arange(len(images))
    images, texts = images.cpu(), texts.cpu()
    figures = {"validation_loss": float(terms.loss)}
    sides = {
        "image_to_text": exact_ranks.retrieve_texts,
        "text_to_image": exact_ranks.retrieve_images,
    }
    for direction, retrieve in sides.items():
        ranks = retrieve(images, texts, own).ranks
        figures |= {f"validation_{direction}_r{k}": hit_rate(ranks, k) for k in (1, 5)}
    return figures


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
    return peers.add_up(features)


def _encode_texts(model: EvaClip, texts: Sequence[str], block: int = BLOCK) -> Tensor:
    """Unit features [len(texts), E], the same on every rank."""
    tokens = tokenize(texts, model.config.text.context_length)
    return encode_in_blocks(
        model, len(tokens), lambda some: model.encode_text(tokens[some], normalize=True), block
    )


class ProbeSet(NamedTuple):
    """All classes of a set, where its images lie, and their labels [N]; the same on every rank."""

    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    images: tuple[set_layout.Span, ...]
    labels: Tensor


def open_probe(folder: Path) -> ProbeSet:
    """Find every image of a set. Raises InputError when the folder holds no such set, or a sample
    has no image or no class."""
    found: list[tuple[set_layout.Span, int]] = []
    try:
        names = set_layout.read_lines(folder / set_layout.CLASSNAMES, "one class name a line")
        templates = set_layout.read_lines(
            folder / set_layout.TEMPLATES, f"one template with {PLACEHOLDER} a line"
        )
        for tar in set_layout.find_tars(folder):
            for key, members in set_layout.read_members(tar).items():
                where = f"{tar}: sample {key}"
                image = set_layout.find_image(members, where)
                if "cls" not in members:
                    raise InputError(f"{where} has no .cls member, which a probe needs")
                label = set_layout.read_label(members["cls"].content, where)
                if label >= len(names):
                    raise InputError(
                        f"{where} has label {label}, but {folder / set_layout.CLASSNAMES} names "
                        f"{len(names)} classes, counted from 0"
                    )
                found.append((image.span, label))
    except InputError as error:
        raise InputError(
            f"probe {folder} cannot be read as an evaluation set: {error}; or leave 'probe' out"
        ) from None
    labels = torch.tensor([label for _, label in found], dtype=torch.long)
    return ProbeSet(names, templates, tuple(span for span, _ in found), labels)


@torch.no_grad()
def run_probe(model: EvaClip, probe: ProbeSet) -> dict[str, float]:
    """Shares of the images whose class is first, and among the first five. Every rank calls it, and
    gets the same.

    An image that cannot be read or decoded, or whose feature is not finite, counts as wrong.
    Nothing, and a warning, where no image's feature is finite or some prompt's is not: whether
    training goes on with such weights is for the guards to say.
    """
    was_training = model.training
    model.eval()
    weight, size = model.logit_scale, model.config.vision.image_px
    transform = image_transform(model)

    def encode_images(some: slice) -> Tensor:
        spans = probe.images[some]
        pixels = torch.full((len(spans), 3, size, size), torch.nan)
        for place, span in enumerate(spans):
            # A rank that raised would leave the others waiting.
            with suppress(UnreadableImageError, InputError, OSError):
                pixels[place] = transform(decode_image(span.read()))
        return model.encode_image(pixels.to(weight.device, weight.dtype), normalize=True)

    images = encode_in_blocks(model, len(probe.images), encode_images).cpu()
    filled = exact_ranks.fill_templates(probe.classnames, probe.templates)
    prompts = _encode_texts(model, filled, PROMPTS_BLOCK).cpu()
    model.train(was_training)
    usable = images.isfinite().all(1)
    leads, unusable = Peers.every_rank().rank == 0, int((~usable).sum())
    if leads and unusable:
        what = "cannot be read, or have no finite feature"
        _log.warning("probe: %d of %d images %s", unusable, len(images), what)
    if not (usable.any() and prompts.isfinite().all()):
        if leads:
            _log.warning("probe: no figures, because features are not finite")
        return {}  # a logit that is not finite would rank every answer first
    classifier = exact_ranks.build_classifier(prompts, probe.classnames)
    ranks = exact_ranks.rank_classes(images[usable], classifier, probe.labels[usable]).ranks
    return {f"probe_top{k}": count_hits(ranks, k) / len(images) for k in (1, 5)}
