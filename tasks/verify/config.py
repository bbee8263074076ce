"""What a shard must be to be trained on: the `[verify]` table of a recipe.

Covers: the config, and the stage's name and version.
Not here: reading shards.
"""

from __future__ import annotations

from pydantic import Field

from evaclip_model.config import Config
from tasks.artifact import Stage

STAGE = Stage("verify", 1, tools=("pillow",))


class VerifyConfig(Config):
    """The `[verify]` table."""

    min_image_px: int = Field(1, gt=0)
    """Smallest accepted side of a stored image, in pixels."""
    max_pixels: int = Field(50_000_000, gt=0)
    """Largest accepted width x height of a stored image; larger ones are not decoded."""
    max_bad_share: float = Field(0.02, ge=0, lt=1)
    """Largest accepted share of bad samples in a shard; a shard with more is left out.

    Training counts and skips bad samples. At web scale about one JPEG in a thousand is truncated
    so that the downloader's decoder takes it and Pillow does not; without tolerance every shard
    of 10,000 would go.
    """
