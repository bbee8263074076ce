"""`objective = "softmax"`: the symmetric contrastive loss of CLIP, as the paper trains with.

Its parameter and bounds. Imports no torch until tensors are there: the formula is in
contrastive.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from evaclip_model.model.model_config import INITIAL_LOGIT_SCALE
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.loss.objective import BLOCK_COLUMNS, BLOCK_ROWS, BLOCKS, LossTerms

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
        self._config = config

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
        captions: Tensor | None = None,
        is_whole_batch: bool = False,
    ) -> LossTerms:
        """Compute the terms as `Objective.compute_terms` says, image and text [b, E]."""
        from evaclip_model.training.loss.contrastive import pair_terms

        return pair_terms(
            image,
            text,
            *scalars.values(),
            captions=captions,
            ignores_same=self._config.same_caption == "ignore",
            label_smoothing=self._config.label_smoothing,
            is_whole_batch=is_whole_batch,
        )

    def gpu_bytes(self, rows: int, columns: int) -> float:
        """Memory as `Objective.gpu_bytes` says."""
        return BLOCKS * 4 * min(rows, BLOCK_ROWS) * min(columns, BLOCK_COLUMNS)
