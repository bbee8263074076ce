"""An objective of training: what the loop asks of it, and making it by its name.

Each is one file beside this one, named in `training.config.OBJECTIVES`. Imports no torch, and
neither may an objective's module before its tensors are there: plans ask for memory without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, Protocol

from evaclip_model.training.config import OBJECTIVES, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK_ROWS = 2048
BLOCK_COLUMNS = 4096
"""Rows and columns of logits in memory at once: 32 MiB in float32, enough for full matrix speed."""
BLOCKS = 8
"""Tensors of a block's size at the loss's peak, generously: logits and what is made of them."""


class LossTerms(NamedTuple):
    """An objective's figures of one step; all [] and of this rank's rows alone."""

    loss: Tensor
    """Mean over the rows, in nats."""
    image_to_text_accuracy: Tensor
    """Share of images whose own caption has the highest score; without gradient."""
    text_to_image_accuracy: Tensor
    """Share of captions whose own image has the highest score; without gradient."""


class Objective(Protocol):
    """The loss of a global batch, with the parameters that belong to it and not to a tower."""

    parameters: Mapping[str, float]
    """Name of a parameter [1] of the model -> its value where the model has none of that name."""
    bounds: Mapping[str, tuple[float, float]]
    """Parameter -> its smallest and largest value; the engine keeps it there after each step."""

    def __init__(self, config: TrainConfig) -> None:
        """Take from a training stage what decides the loss, and how it is computed."""

    def read_scalars(self, model: nn.Module) -> dict[str, Tensor]:
        """The numbers that the loss depends on besides features, made from the parameters.

        Returns: Name of the metric that each is shown as -> [] in at least float32, with gradient.
        """

    def compute_terms(
        self,
        image: Tensor,
        text: Tensor,
        scalars: Mapping[str, Tensor],
        *,
        captions: Tensor | None = None,
        is_whole_batch: bool = False,
    ) -> LossTerms:
        """The loss of this rank's pairs within the global batch; every rank calls it.

        The mean over ranks of the loss and of its gradient is that of one process with all pairs.

        Args:
            image, text: [b, E] features of unit length; row i of both is one pair.
            scalars: as `read_scalars` gives them.
            captions: [b] int64, equal where captions are; none unless `same_caption` asks for it.
            is_whole_batch: these pairs are all, whatever ranks there are.
        """

    def gpu_bytes(self, rows: int, columns: int) -> float:
        """Most bytes of a GPU's memory that the loss of a rank's `rows` pairs within a global batch
        of `columns` takes beside the features."""


def make_objective(config: TrainConfig) -> Objective:
    """The objective of a training stage."""
    module, _, name = OBJECTIVES[config.objective].partition(":")
    objective: Objective = getattr(import_module(module), name)(config)
    return objective
