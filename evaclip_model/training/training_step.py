"""One optimizer step of a rank, from a batch to its gradient: a sample's inputs (template, parts of
its caption, patches, branches), the loss of the global batch and its gradient, the same however
many parts a rank's share is worked on in.

All that is random is a pure function of the seed and a sample's position. So a resumed run, and one
on other hardware, shows every sample alike; and so does a part that is passed forward twice.

Each sample is contrasted with the whole global batch, so the parts of a rank's share cannot have
losses of their own: ordinary gradient accumulation would change the negatives. Instead the features
of all parts come first, without activations; then the loss, and its gradient by every feature; then
each part again, with its activations, to carry that gradient on into the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from evaclip_model.model.layers import drop_path_rates
from evaclip_model.model.model_config import VisionConfig
from evaclip_model.reading.samples import number_bytes
from evaclip_model.reading.transform import normalize_images
from evaclip_model.tokenizer.tokenizer import tokenize
from evaclip_model.training.config import TrainConfig

if TYPE_CHECKING:  # so that masks and captions can be had without the trainer
    from evaclip_model.reading.reader import Batch, Origin
    from evaclip_model.training.engine.engine import Engine
    from evaclip_model.training.loss.objective import LossTerms, Objective

KEPT_CAPTIONS = 100_000
"""Tokenised captions kept in memory."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BRANCHES = np.uint64(0x6272616E63686573)
_WORDS = np.uint64(0x776F726473)
"""Set the draws of branches and of words apart from those of patches."""


@dataclass(frozen=True)
class ModelInputs:
    """Samples of one rank, b of them, and what they are masked by; on the CPU, or pixels and masks
    on the model's device already."""

    images: Tensor
    """[b, 3, H, H] uint8 pixels, made floats part by part, so that a large share never is at once.
    """
    tokens: Tensor
    """[b, L] ids, on the CPU (the text tower plans there)."""
    kept: Tensor | None = None
    """[b, K] patches to look at; none for all."""
    branches: Tensor | None = None
    """[b, blocks, 2] which branches of the image tower each sample passes; none without drop
    path."""

    def __len__(self) -> int:
        return len(self.images)

    def split_parts(self, size: int | None) -> list[Self]:
        """The samples in parts of `size` (the last may be smaller), as views; none: one part."""
        size = size or len(self)
        held = {name: value for name, value in vars(self).items() if value is not None}
        return [
            replace(self, **{name: value[first : first + size] for name, value in held.items()})
            for first in range(0, len(self), size)
        ]


def step_inputs(
    config: TrainConfig,
    vision: VisionConfig,
    step: int,
    images: Tensor,
    tokens: Tensor,
    positions: Tensor,
) -> ModelInputs:
    """A rank's share of a step (counted from 0), images [b, 3, H, H] uint8 and tokens [b, L],
    masked as the step and the samples' positions [b] in the whole training stream say. The stage's
    drop path counts, not the image tower's own."""
    masked = patch_dropout_at(config, step)
    kept = branches = None
    if masked > 0:
        kept = kept_patches(config.seed, positions, vision.num_patches, 1 - masked)
    if config.drop_path > 0:
        rates = drop_path_rates(config.drop_path, vision.layers)
        branches = kept_branches(config.seed, positions, rates)
    return ModelInputs(images, tokens, kept, branches)


def tokenize_captions(
    captions: Sequence[str], positions: Sequence[int], config: TrainConfig, length: int
) -> Tensor:
    """[b, L] ids of captions in their templates, on the CPU, where the text tower plans; L is
    `length`, or the stage's `text_tokens`."""
    shown = zip(captions, positions, strict=True)
    count = min(length, config.text_tokens or length)
    room = length if config.text_tokens_kept == "random" else count
    tokens = torch.stack(
        [_tokenize_text(vary_caption(text, config, place), room) for text, place in shown]
    )
    return tokens if room == count else kept_tokens(tokens, config.seed, positions, count)


@lru_cache(KEPT_CAPTIONS)
def _tokenize_text(text: str, length: int) -> Tensor:
    return tokenize([text], length)[0]


class StepTerms(NamedTuple):
    """Figures of a step's forward pass, of this rank alone, without gradient: `LossTerms`, and the
    same on every rank, `Objective.read_scalars`."""

    loss: Tensor
    image_to_text_accuracy: Tensor
    text_to_image_accuracy: Tensor
    scalars: Mapping[str, Tensor]
    finite_rows: Tensor
    """[b] bool: the features of this rank's sample are numbers. A sample with others makes the loss
    of every rank no number; this tells whose it is."""


def forward_backward(
    engine: Engine,
    parts: Sequence[ModelInputs],
    objective: Objective,
    captions: Tensor | None = None,
    teachers: Sequence[Tensor] = (),
) -> StepTerms:
    """Compute the loss of the global batch, and leave its gradient with the engine. Every rank
    calls it, with as many samples and parts as the others; `captions` [b, 2] and `teachers` as an
    `Objective` takes them.

    One part is one forward and one backward pass. Of several all but the last pass forward twice;
    at any time the activations of one part are in memory, beside the features of all.
    """
    module = engine.module
    given: dict[str, Any] = {"teachers": teachers} if teachers else {}
    if len(parts) == 1:
        image, text = _encode_part(module, parts[0])
        scalars = objective.read_scalars(module)
        terms = objective.compute_terms(image, text, scalars, captions=captions, **given)
        engine.backward(terms.loss, last=True)
        return _without_gradient(terms, image, text, scalars)
    *earlier, final = parts
    with torch.no_grad():
        seen = [_encode_part(module, part) for part in earlier]
    final_features = _encode_part(module, final)  # the first to be carried on: its pass stays
    final_scalars = objective.read_scalars(module)
    images, texts = (
        torch.cat([features[side] for features in (*seen, final_features)]).detach()
        for side in (0, 1)
    )
    scalars = {name: value.detach() for name, value in final_scalars.items()}
    leaves = [images, texts, *scalars.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    terms = objective.compute_terms(images, texts, scalars, captions=captions, **given)
    d_images, d_texts, *d_scalars = torch.autograd.grad(terms.loss, leaves)
    sizes = [len(part) for part in parts]
    by_part = list(zip(torch.split(d_images, sizes), torch.split(d_texts, sizes), strict=True))
    # Scalars are the same for all parts: their gradient comes once, as zero from the others, so
    # that every part reaches every parameter (DeepSpeed counts on that).
    backward_from_features(
        engine, (*final_features, *final_scalars.values()), (*by_part[-1], *d_scalars), last=False
    )
    del final_features, final_scalars  # and with them, the activations
    nothing = [torch.zeros_like(gradient) for gradient in d_scalars]
    for number, (part, gradients) in enumerate(zip(earlier, by_part, strict=False), 1):
        features = (*_encode_part(module, part), *objective.read_scalars(module).values())
        backward_from_features(
            engine, features, (*gradients, *nothing), last=number == len(earlier)
        )
    return _without_gradient(terms, images, texts, scalars)


def backward_from_features(
    engine: Engine, features: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool
) -> None:
    """Carry known gradients of features, [b, E] or [] as these are, on into the weights."""
    products = [(f * d).sum() for f, d in zip(features, gradients, strict=True)]
    engine.backward(reduce(torch.add, products), last=last)


def _encode_part(module: nn.Module, part: ModelInputs) -> tuple[Tensor, Tensor]:
    """Features [b, E] of images and texts, in at least float32."""
    weight = next(module.parameters())
    kept, branches = (
        None if mask is None else mask.to(weight.device, non_blocking=True)
        for mask in (part.kept, part.branches)
    )
    pixels = part.images.to(weight.device, non_blocking=True).contiguous()
    images = normalize_images(pixels).to(weight.dtype)
    image, text, _ = module(images, part.tokens, kept, branches)
    return image, text


def _without_gradient(
    terms: LossTerms, image: Tensor, text: Tensor, scalars: Mapping[str, Tensor]
) -> StepTerms:
    return StepTerms(
        terms.loss.detach(),
        *terms[1:],
        # Copies: an objective may give a view of its parameter, which the update changes.
        {name: value.detach().clone() for name, value in scalars.items()},
        (image.detach().isfinite() & text.detach().isfinite()).all(1),
    )


def caption_lengths(tokens: Tensor) -> Tensor:
    """[b] tokens of each row of ids [b, L], its start and end among them."""
    return tokens.argmax(1) + 1  # the end token has the largest id


def vary_caption(caption: str, config: TrainConfig, position: int) -> str:
    """The caption as the sample at `position` of the training stream shows it."""
    templates = config.caption_templates
    template = templates[_draw_number("template", config.seed, position, len(templates))]
    return template.replace("{}", cut_caption(caption, config, position))


def cut_caption(caption: str, config: TrainConfig, position: int) -> str:
    """The parts of the caption that the sample at `position` shows, without a template."""
    if config.caption_separator is None:
        return caption
    parts = caption.split(config.caption_separator)
    kept = 1 + _draw_number("parts", config.seed, position, len(parts))
    return config.caption_separator.join(parts[:kept])


def number_batch(batch: Batch, config: TrainConfig) -> Tensor | None:
    """[b, 2] int64, equal on all ranks where captions as shown are, templates aside, and where
    images are; none where `same_caption` makes no difference of it."""
    if config.same_caption == "negative":
        return None
    shown = zip(batch.captions, batch.positions.tolist(), strict=True)
    return number_pairs([cut_caption(text, config, at) for text, at in shown], batch.origins)


def number_pairs(captions: Sequence[str], origins: Sequence[Origin]) -> Tensor:
    """[n, 2] int64 of captions and images, equal where these are."""
    texts = [number_bytes(text.encode()) for text in captions]
    return torch.tensor([texts, [origin.image for origin in origins]]).T


def _draw_number(purpose: str, seed: int, position: int, choices: int) -> int:
    """A number below `choices` that depends on purpose, seed and position alone."""
    if choices == 1:
        return 0
    digest = hashlib.blake2b(f"{purpose}:{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % choices


def patch_dropout_at(config: TrainConfig, step: int) -> float:
    """Share of patches masked out at optimizer step `step`, counted from 0: a line from
    `patch_dropout` at the first step to `patch_dropout_end` at the last masked one; 0 in the last
    `unmasked_final_share` of the steps."""
    masked = config.steps - round(config.steps * config.unmasked_final_share)
    if step >= masked:
        return 0.0
    first, end = config.patch_dropout, config.patch_dropout_end
    if end is None or masked == 1:
        return first
    return first + (end - first) * step / (masked - 1)


def kept_patches(seed: int, positions: Tensor, num_patches: int, keep_ratio: float) -> Tensor:
    """Uniformly random patches, the same number for every sample, drawn from nothing but the
    arguments: [B, K] int64 on the CPU, ascending in a row; K = floor(N * keep_ratio), at least 1.
    Raises ValueError for a `keep_ratio` outside (0, 1].

    Args:
        positions: [B] position of each sample in the whole training stream (0 = first sample).
        num_patches: N, without the class token.
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
    # 1 - 0.9 is a little less than 0.1: without the margin a tenth of 100 patches would be 9.
    count = max(1, int(num_patches * keep_ratio + 1e-6))
    rank = _draw_bits(_mix_positions(seed, positions), num_patches)
    kept = np.argsort(rank, axis=1, kind="stable")[:, :count]
    return torch.from_numpy(np.sort(kept, axis=1))


def kept_tokens(tokens: Tensor, seed: int, positions: Sequence[int], count: int) -> Tensor:
    """[B, `count`] ids of tokens [B, L]: of a longer caption start, end and random ones between
    them, in their order, drawn from nothing but the arguments (`positions` as in `kept_patches`).
    """
    ids, places = tokens.numpy(), np.arange(tokens.shape[1])
    rank = _draw_bits(
        _mix_bits(_mix_positions(seed, torch.tensor(positions)) + _WORDS), len(places)
    )
    ends = ids.argmax(1)[:, None]
    rank[(places == 0) | (places == ends)] = 0
    rank[places > ends] = np.iinfo(np.uint64).max
    kept = np.sort(np.argsort(rank, axis=1, kind="stable")[:, :count], axis=1)
    return torch.from_numpy(np.take_along_axis(ids, kept, axis=1))


def kept_branches(seed: int, positions: Tensor, rates: Sequence[float]) -> Tensor:
    """The branches of each block that each sample passes, drawn from nothing but the arguments, by
    the samples' positions [B] as in `kept_patches` and each block's chance of skipping one:
    [B, blocks, 2] bool on the CPU; attention first, then the MLP, each drawn for itself."""
    drawn = _draw_bits(_mix_bits(_mix_positions(seed, positions) + _BRANCHES), 2 * len(rates))
    uniform = (drawn >> np.uint64(11)) * 2.0**-53  # [B, 2 * blocks] in [0, 1)
    kept = uniform >= np.repeat(np.asarray(rates, dtype=np.float64), 2)
    return torch.from_numpy(kept.reshape(len(positions), len(rates), 2))


def _mix_positions(seed: int, positions: Tensor) -> np.ndarray:
    return _mix_bits(positions.cpu().numpy().astype(np.uint64) + _mix_bits(np.uint64(seed % 2**64)))


def _draw_bits(sample: np.ndarray, count: int) -> np.ndarray:
    """[B, count] uint64 of samples [B]: SplitMix64's stream of each."""
    with np.errstate(over="ignore"):
        return _mix_bits(sample[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def _mix_bits(x: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's finaliser: neighbouring inputs give unrelated outputs."""
    z = np.atleast_1d(np.asarray(x, dtype=np.uint64)).copy()
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
