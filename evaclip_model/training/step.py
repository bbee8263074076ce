"""Forward and backward of one optimizer step, whole or in parts of a rank's share.

Covers: what a step's samples are masked by; the loss of the global batch; its gradient, the same
however many parts a rank's share is worked on in.
Not here: the update (training/engine/engine.py), the exchange of what is reported (trainer.py), the
loss (training/loss/contrastive.py).

Each sample is contrasted with the whole global batch, so the parts of a rank's share cannot have
losses of their own: ordinary gradient accumulation would change the negatives. Instead the features
of all parts come first, without activations; then the loss, and its gradient by every feature; then
each part again, with its activations, to carry that gradient on into the weights. What a sample is
masked by is drawn from its position, so that it is the same both times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from evaclip_model.model.layers import drop_path_rates
from evaclip_model.model.model_config import VisionConfig
from evaclip_model.reading.transform import normalize_images
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine.engine import Engine
from evaclip_model.training.loss.contrastive import ContrastiveTerms, LossSettings, gathered_terms
from evaclip_model.training.masking import kept_branches, kept_patches, patch_dropout_at


@dataclass(frozen=True)
class ModelInputs:
    """Samples of one rank, b of them, and what they are masked by; on the CPU, or pixels and masks
    on the model's device already."""

    images: Tensor
    """[b, 3, H, H] uint8 pixels: they become floats where they are needed, part by part, so that a
    large share never lies in memory as floats."""
    tokens: Tensor
    """[b, L] ids, on the CPU (the text tower plans there)."""
    kept: Tensor | None = None
    """[b, K] patches to look at; none for all."""
    branches: Tensor | None = None
    """[b, blocks, 2] which branches of the image tower each sample passes; none without drop
    path."""

    def __len__(self) -> int:
        return len(self.images)

    def parts(self, size: int | None) -> list[Self]:
        """The samples in parts of `size` (the last may be smaller), as views; none: one part."""
        return [
            replace(
                self,
                images=self.images[some],
                tokens=self.tokens[some],
                kept=None if self.kept is None else self.kept[some],
                branches=None if self.branches is None else self.branches[some],
            )
            for some in _slices(len(self), size or len(self))
        ]


@dataclass(frozen=True)
class StepTerms:
    """What the forward pass of a step gave, of this rank alone, without gradient."""

    loss: Tensor
    """[] mean over this rank's rows, in nats; the mean over ranks is that of the global batch."""
    image_to_text_accuracy: Tensor
    """[] share of this rank's images whose own caption, of all ranks', has the highest score."""
    text_to_image_accuracy: Tensor
    """[] likewise for captions."""
    logit_scale: Tensor
    """[] inverse temperature, the same on every rank."""
    finite_rows: Tensor
    """[b] bool: the features of this rank's sample are numbers. A sample with others makes the loss
    of every rank no number; this tells whose it is."""

    @property
    def finite(self) -> Tensor:
        """[] bool: loss and all features of this rank are numbers."""
        return self.finite_rows.all() & self.loss.isfinite()


def step_inputs(
    config: TrainConfig,
    vision: VisionConfig,
    step: int,
    images: Tensor,
    tokens: Tensor,
    positions: Tensor,
) -> ModelInputs:
    """A rank's share of a step, masked as its positions and the step say.

    Args:
        vision: the image tower; its own drop path does not count, the training stage's does
            (`EvaClip.set_drop_path`).
        step: optimizer step, counted from 0.
        images: [b, 3, H, H] uint8 pixels.
        tokens: [b, L] ids.
        positions: [b] of the samples in the whole training stream.
    """
    masked = patch_dropout_at(config, step)
    kept = branches = None
    if masked > 0:
        kept = kept_patches(config.seed, positions, vision.num_patches, 1 - masked)
    if config.drop_path > 0:
        rates = drop_path_rates(config.drop_path, vision.layers)
        branches = kept_branches(config.seed, positions, rates)
    return ModelInputs(images, tokens, kept, branches)


def loss_settings(config: TrainConfig) -> LossSettings:
    """The loss of a training stage."""
    return LossSettings(config.loss_impl, config.label_smoothing)


def forward_backward(
    engine: Engine, parts: Sequence[ModelInputs], *, loss: LossSettings
) -> StepTerms:
    """The loss of the global batch, its gradient left with the engine.

    Every rank calls it, with as many samples as the others. One part is one forward and one
    backward pass. Of several parts all but the last pass forward twice; at any time the activations
    of one part are in memory, beside the features of all.

    Args:
        parts: this rank's share of the global batch, in order; all ranks as many.
    """
    if len(parts) == 1:
        image, text, scale = _features(engine.module, parts[0])
        terms = gathered_terms(image, text, scale, settings=loss)
        engine.backward(terms.loss, last=True)
        return _reported(terms, image, text, scale)
    *earlier, final = parts
    with torch.no_grad():
        seen = [_features(engine.module, part)[:2] for part in earlier]
    final_features = _features(engine.module, final)  # the first to be carried on: its pass stays
    images, texts = (
        torch.cat([features[side] for features in (*seen, final_features)]).detach()
        for side in (0, 1)
    )
    scale = final_features[2].detach()
    leaves = images, texts, scale
    for leaf in leaves:
        leaf.requires_grad_()
    terms = gathered_terms(images, texts, scale, settings=loss)
    d_images, d_texts, d_scale = torch.autograd.grad(terms.loss, leaves)
    sizes = [len(part) for part in parts]
    by_part = list(zip(torch.split(d_images, sizes), torch.split(d_texts, sizes), strict=True))
    # The temperature is one for all parts: its gradient comes once, as zero from the others, so
    # that every part reaches every parameter (DeepSpeed counts on that).
    _carry_on(engine, final_features, (*by_part[-1], d_scale), last=False)
    del final_features  # and with it, the activations
    nothing = torch.zeros_like(d_scale)
    for number, (part, (d_image, d_text)) in enumerate(zip(earlier, by_part, strict=False), 1):
        features = _features(engine.module, part)
        _carry_on(engine, features, (d_image, d_text, nothing), last=number == len(earlier))
    return _reported(terms, images, texts, scale)


def _slices(length: int, size: int) -> Iterator[slice]:
    for first in range(0, length, size):
        yield slice(first, first + size)


def _features(module: nn.Module, part: ModelInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Features [b, E] of images and texts and the inverse temperature [], in float32."""
    weight = next(module.parameters())
    kept, branches = (
        None if mask is None else mask.to(weight.device, non_blocking=True)
        for mask in (part.kept, part.branches)
    )
    pixels = part.images.to(weight.device, non_blocking=True).contiguous()
    images = normalize_images(pixels).to(weight.dtype)
    features: tuple[Tensor, Tensor, Tensor] = module(images, part.tokens, kept, branches)
    return features


def _carry_on(
    engine: Engine, features: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool
) -> None:
    """Backward from features whose gradients are known: those of a sum of products with them."""
    products = [(f * d).sum() for f, d in zip(features, gradients, strict=True)]
    engine.backward(products[0] + products[1] + products[2], last=last)


def _reported(terms: ContrastiveTerms, image: Tensor, text: Tensor, scale: Tensor) -> StepTerms:
    return StepTerms(
        terms.loss.detach(),
        terms.image_to_text_accuracy,
        terms.text_to_image_accuracy,
        scale.detach(),
        (image.detach().isfinite() & text.detach().isfinite()).all(1),
    )
