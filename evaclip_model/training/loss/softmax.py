"""`objective = "softmax"`: the symmetric contrastive loss of CLIP, as the paper trains with.

Its parameter and bounds, the choice between keeping the logits and making them twice, and the
memory that each takes. Imports no torch until tensors are there; the formula is in contrastive.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from evaclip_model.training.loss.objective import LossTerms

if TYPE_CHECKING:
    from torch import Tensor, nn

    from evaclip_model.training.config import TrainConfig

LOGIT_SCALE = "logit_scale"
"""Parameter: the logarithm of the inverse temperature. Metric: the inverse temperature."""
STREAM_FROM_BYTES = 2**30
"""Memory of the logits above which "auto" streams the loss: below it the full loss is faster and
its logits are small beside the activations of as many samples."""
LOGITS_COPIES = 6
"""Matrices of logits that the full loss has at its peak: in both directions the logits, their
log-softmax and their gradient."""
STREAMED_LOSS_BYTES = 2**28
"""Memory of the streamed loss whatever the batch: a chunk of logits and what is made of it."""


@dataclass(frozen=True)
class LossSettings:
    """Settings of the softmax loss."""

    impl: Literal["auto", "full", "streamed"] = "auto"
    """"full" keeps the logits, "streamed" makes them twice, chunk by chunk; "auto" streams when the
    full loss would take more than `STREAM_FROM_BYTES`. The results are the same."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all B columns, the right one too; in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")

    def should_stream(self, rows: int, columns: int) -> bool:
        """True when `rows` x `columns` float32 logits of each direction are made chunk by chunk."""
        if self.impl == "auto":
            return _logits_bytes(rows, columns) > STREAM_FROM_BYTES
        return self.impl == "streamed"


class SoftmaxObjective:
    """Every image is to find its caption among all, and every caption its image."""

    parameters: Mapping[str, float] = {LOGIT_SCALE: math.log(1 / 0.07)}
    bounds: Mapping[str, tuple[float, float]] = {LOGIT_SCALE: (0.0, math.log(100))}
    """Of the logarithm of the inverse temperature (CLIP, section 2.5)."""

    def __init__(self, config: TrainConfig) -> None:
        self._settings = LossSettings(config.loss_impl, config.label_smoothing)

    def read_scalars(self, model: nn.Module) -> dict[str, Tensor]:
        """The inverse temperature []."""
        import torch

        logarithm: Tensor = getattr(model, LOGIT_SCALE)
        wide = torch.promote_types(logarithm.dtype, torch.float32)
        return {LOGIT_SCALE: logarithm.to(wide).exp().squeeze(0)}

    def compute_terms(
        self,
        image: Tensor,
        text: Tensor,
        scalars: Mapping[str, Tensor],
        *,
        is_whole_batch: bool = False,
    ) -> LossTerms:
        """As `Objective.compute_terms`, image and text [b, E]."""
        from evaclip_model.training.loss.contrastive import contrastive_terms, gathered_terms

        terms = contrastive_terms if is_whole_batch else gathered_terms
        return terms(image, text, scalars[LOGIT_SCALE], settings=self._settings)

    def gpu_bytes(self, rows: int, columns: int) -> float:
        """As `Objective.gpu_bytes`."""
        if self._settings.should_stream(rows, columns):
            return STREAMED_LOSS_BYTES
        return _logits_bytes(rows, columns)


def _logits_bytes(rows: int, columns: int) -> float:
    return LOGITS_COPIES * 4 * rows * columns
