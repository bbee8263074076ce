"""`objective = "sigmoid"`: SigLIP's loss, which asks of every image and caption whether they belong
together (Zhai et al. 2023, algorithm 1).

Its parameters: softmax's, and a bias of the logits. The formula is in contrastive.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evaclip_model.model.model_config import INITIAL_LOGIT_BIAS, LOGIT_BIAS
from evaclip_model.training.loss.softmax import SoftmaxObjective

if TYPE_CHECKING:
    from torch import Tensor, nn


class SigmoidObjective(SoftmaxObjective):
    """Every image is to know its caption, and that the others are not; each pair for itself."""

    parameters: Mapping[str, float] = {
        **SoftmaxObjective.parameters,
        LOGIT_BIAS: INITIAL_LOGIT_BIAS,
    }

    def read_scalars(self, model: nn.Module) -> dict[str, Tensor]:
        """The inverse temperature and the bias, both []."""
        from evaclip_model.model.layers import to_float32

        bias = to_float32(getattr(model, LOGIT_BIAS)).squeeze(0)
        return {**super().read_scalars(model), LOGIT_BIAS: bias}
