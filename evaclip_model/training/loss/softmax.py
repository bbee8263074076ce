"""`objective = "softmax"`: the symmetric contrastive loss of CLIP, as the paper trains with.

Its parameter and bounds. Imports no torch until tensors are there: the formula is in
contrastive.py, settings and memory in training/config.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from evaclip_model.model.model_config import INITIAL_LOGIT_SCALE
from evaclip_model.training.config import LossSettings, TrainConfig
from evaclip_model.training.loss.objective import LossTerms

if TYPE_CHECKING:
    from torch import Tensor, nn

LOGIT_SCALE = "logit_scale"
"""Parameter: the logarithm of the inverse temperature. Metric: the inverse temperature."""


class SoftmaxObjective:
    """Every image is to find its caption among all, and every caption its image."""

    parameters: Mapping[str, float] = {LOGIT_SCALE: INITIAL_LOGIT_SCALE}
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
        return self._settings.loss_bytes(rows, columns)
