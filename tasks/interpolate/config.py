"""Settings of weight interpolation (WiSE-FT): the `[interpolate]` table. No torch here."""

from typing import Annotated

from pydantic import Field

from evaclip_model.config import Config
from tasks.artifacts.artifact import Stage

STAGE = Stage("interpolate", 1, tools=("torch", "safetensors"))
CHOICE = "choice.json"
"""The figures of every weight, and which was chosen."""


class InterpolateConfig(Config):
    """Weights between start and end, and the sets that decide which is taken."""

    weights: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=(0, 0.25, 0.5, 0.75, 1), min_length=1
    )
    """Shares of the trained model, the rest is of the one that training began with."""
    choose_on: tuple[str, ...] = Field(min_length=1)
    """Evaluation sets on whose mean figure the best is taken."""
    keep_on: tuple[str, ...] = ()
    """Evaluation sets on which what is taken loses little against the start."""
    max_loss_points: float = Field(default=1.0, ge=0)
    """Most that a figure of these may lose, in points, as the gate's rule of this name has it."""
