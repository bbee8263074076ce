"""Conditions on a shard to be trained on: the `[verify]` table of a recipe."""

from pydantic import Field

from evaclip_model.config import Config
from tasks.artifacts.artifact import Stage

STAGE = Stage(
    "verify", 2, tools=("pillow", "numpy", "pyarrow", "duckdb"), ignores=("memory_limit",)
)


class VerifyConfig(Config):
    min_image_px: int = Field(1, gt=0)
    """Smallest accepted side of a stored image, in pixels."""
    max_pixels: int = Field(50_000_000, gt=0)
    """Largest accepted width x height of a stored image; larger ones are not decoded."""
    max_bad_share: float = Field(0.02, ge=0, lt=1)
    """Largest accepted share of bad samples in a shard; a shard with more is left out, of others
    the bad samples alone. At web scale about one JPEG in a thousand is truncated."""
    memory_limit: str = Field(default="2GB", pattern=r"^[0-9]+(\.[0-9]+)? ?([KMGT]i?)?B$")
    """Memory for sorting the index; what does not fit goes to disk."""
