"""Objectives of training: CLIP's softmax and SigLIP's sigmoid (Zhai et al. 2023, algorithm 1), as
the loop asks for them.

Another one has the same attributes and methods, is a file beside this one, and is named in
`training.config.OBJECTIVES`. Neither may import torch before its tensors are there: plans ask for
memory without it. The formulas are in contrastive.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from evaclip_model.model.model_config import INITIAL_LOGIT_BIAS, INITIAL_LOGIT_SCALE, LOGIT_BIAS
from evaclip_model.training.config import OBJECTIVES, TrainConfig, feature_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK_ROWS = 2048
BLOCK_COLUMNS = 4096
"""Rows and columns of logits in memory at once: 32 MiB in float32, enough for full matrix speed."""
BLOCKS = 8
"""Tensors of a block's size at the loss's peak, generously: logits and what is made of them."""
LOGIT_SCALE = "logit_scale"
"""Parameter: the logarithm of the inverse temperature. Metric: the inverse temperature."""


class LossTerms(NamedTuple):
    """An objective's figures of one step; all [] and of this rank's rows alone, whose number they
    are weighted by where ranks have different ones."""

    loss: Tensor
    """Mean over the rows, in nats."""
    image_to_text_accuracy: Tensor
    """Share of images whose own caption has the highest score; without gradient."""
    text_to_image_accuracy: Tensor


class Objective:
    """Softmax: every image is to find its caption among all, and every caption its image. What
    belongs to the loss and not to a tower is here."""

    parameters: Mapping[str, float] = {LOGIT_SCALE: INITIAL_LOGIT_SCALE}
    """Name of a parameter [1] of the model -> its value where the model has none of that name."""
    bounds: Mapping[str, tuple[float, float]] = {LOGIT_SCALE: (0.0, math.log(100))}
    """Parameter -> its smallest and largest value (CLIP, section 2.5); the engine keeps it there
    after each step."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config

    def read_scalars(self, model: nn.Module) -> dict[str, Tensor]:
        """The numbers that the loss depends on besides features, made from the parameters: name of
        the metric that each is shown as -> [] in at least float32, with gradient."""
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
        teachers: Sequence[Tensor] = (),
        is_whole_batch: bool = False,
    ) -> LossTerms:
        """The loss of this rank's pairs within the global batch; every rank calls it.

        The mean over ranks of the loss and of its gradient is that of one process with all pairs.

        Args:
            image, text: [b, E] features of unit length; row i of both is one pair.
            scalars: as `read_scalars` gives them.
            captions: [b, 2] int64, equal where captions, or images, are; none unless `same_caption`
                asks for it.
            teachers: [b, 2, D] unit features of these images and captions by each teacher of the
                stage; none: without its divergence.
            is_whole_batch: these pairs are all, whatever ranks there are.
        """
        from torch import distributed as dist

        from evaclip_model.training.loss.contrastive import pair_terms

        ranks = dist.get_world_size() if dist.is_initialized() and not is_whole_batch else 1
        return pair_terms(
            image,
            text,
            *scalars.values(),
            captions=captions,
            ignores_same=self._config.same_caption == "ignore",
            label_smoothing=self._config.label_smoothing,
            teachers=teachers,
            teacher=self._config.teacher,
            is_whole_batch=is_whole_batch,
            is_uneven=self._config.global_batch % ranks > 0,
        )

    def gpu_bytes(self, rows: int, columns: int) -> float:
        """Most bytes of a GPU's memory that the loss of a rank's `rows` pairs within a global batch
        of `columns` takes beside the features."""
        models = self._config.teacher.models if self._config.teacher else ()
        blocks = BLOCKS * 4 * min(rows, BLOCK_ROWS) * min(columns, BLOCK_COLUMNS)
        return blocks + sum(map(feature_bytes, models)) * columns


class SigmoidObjective(Objective):
    """Every image is to know its caption, and that the others are not; each pair for itself."""

    parameters: Mapping[str, float] = {**Objective.parameters, LOGIT_BIAS: INITIAL_LOGIT_BIAS}

    def read_scalars(self, model: nn.Module) -> dict[str, Tensor]:
        """The inverse temperature and the bias of the logits, both []."""
        from evaclip_model.model.layers import to_float32

        bias = to_float32(getattr(model, LOGIT_BIAS)).squeeze(0)
        return {**super().read_scalars(model), LOGIT_BIAS: bias}


def make_objective(config: TrainConfig) -> Objective:
    module, _, name = OBJECTIVES[config.objective].partition(":")
    objective: Objective = getattr(import_module(module), name)(config)
    return objective
