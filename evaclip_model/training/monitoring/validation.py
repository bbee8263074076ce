"""Evaluation while training goes on: loss and retrieval on the pairs that the dataset holds out
(`dataset.validation_share`), which no step is shown; and a probe, zero-shot classification of a
small set (zeroshot/set_layout.py: an image and `KEY.cls` a sample). Evaluation proper is
tasks/evaluate.

What is encoded comes in blocks of a fixed size, whole blocks by one rank, and every rank computes
the figures from all features: they do not depend on the number of ranks, and no rank ends or goes
on alone. Nothing is drawn, and the model stays as it is.
"""

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
    """A rank's part of the images, encoded; and all classes."""

    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    images: tuple[bytes, ...]
    labels: tuple[int, ...]


def open_probe(folder: Path, rank: int, ranks: int) -> ProbeSet:
    """Read every image number `rank`, `rank` + `ranks` ... of a set into memory. Raises InputError
    when the folder holds no such set, or a sample has no image or no class."""
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
    mine = found[rank::ranks]
    images, labels = (span.read() for span, _ in mine), (label for _, label in mine)
    return ProbeSet(names, templates, tuple(images), tuple(labels))


@torch.no_grad()
def run_probe(model: EvaClip, part: ProbeSet) -> tuple[float, float]:
    """Shares of all ranks' images whose class is first, and among the first five; every rank calls.

    An image that cannot be decoded, or whose feature is not finite, counts as wrong; all do when
    a prompt's feature is not.
    """
    was_training = model.training
    model.eval()
    prompts = exact_ranks.fill_templates(part.classnames, part.templates)
    features = _encode_texts(model, prompts, PROMPTS_BLOCK)
    classifier = exact_ranks.build_classifier(features.cpu(), part.classnames)
    right = torch.zeros(3, dtype=torch.float64)
    right[2] = len(part.images)
    # A logit that is not finite would rank every answer first.
    for first in range(0, len(part.images) if classifier.isfinite().all() else 0, BLOCK):
        some = slice(first, first + BLOCK)
        features, labels = _encode_images(model, part.images[some], part.labels[some])
        if len(labels):
            ranks = exact_ranks.rank_classes(features, classifier, labels).ranks
            right[0] += count_hits(ranks, 1)
            right[1] += count_hits(ranks, 5)
    model.train(was_training)
    right = Peers.every_rank().add_up(right.to(model.logit_scale.device))
    first_right, five_right, total = right.tolist()
    return first_right / max(1.0, total), five_right / max(1.0, total)


def _encode_images(
    model: EvaClip, images: tuple[bytes, ...], labels: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Unit features [n, E] of those that have any, on the CPU, and their labels [n]."""
    transform, pixels, known = image_transform(model), [], []
    for image, label in zip(images, labels, strict=True):
        with suppress(UnreadableImageError):
            pixels.append(transform(decode_image(image)))
            known.append(label)
    if not pixels:
        return torch.zeros(0, model.config.embed_dim), torch.zeros(0, dtype=torch.long)
    stacked = torch.stack(pixels).to(model.logit_scale.device, model.logit_scale.dtype)
    features = model.encode_image(stacked, normalize=True).float().cpu()
    finite = features.isfinite().all(1)
    return features[finite], torch.tensor(known)[finite]
