"""What is downloaded and how it is stored: the `[download]` table of a recipe.

Covers: the config, and the stage's name and version.
Not here: downloading; processes and threads (they change the time, not the result).
"""

from __future__ import annotations

from ipaddress import ip_network
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from evaclip_model.config import Config
from tasks.artifact import Stage

STAGE = Stage("download", 1, tools=("img2dataset", "webdataset", "pyarrow"))


class DownloadConfig(Config):
    """The `[download]` table; defaults are what LAION's own downloads used, made safe."""

    samples_per_shard: int = Field(10_000, gt=0, le=100_000)
    """Rows of a shard, failed ones included; rows_per_file of the merge is a multiple of it."""
    image_px: int = Field(256, gt=0)
    """Length of the shorter (keep_ratio, center_crop) or longer side after resizing, in pixels."""
    resize_mode: Literal["keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"] = (
        "keep_ratio"
    )
    """How an image meets image_px, in img2dataset's words."""
    resize_only_if_bigger: bool = True
    """Leave smaller images as they are."""
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    """What images are stored as."""
    encode_quality: int = Field(95, ge=0, le=100)
    """JPEG or WebP quality, 0 to 100; for png the compression, 0 to 9."""
    skip_reencode: bool = True
    """Store the original bytes when they have the format already and need no resizing."""
    min_image_px: int = Field(0, ge=0)
    """Smallest accepted side of the original, in pixels."""
    max_aspect_ratio: float = Field(20.0, ge=1)
    """Largest accepted longer : shorter side of the original."""
    max_pixels: int = Field(50_000_000, gt=0)
    """Largest accepted width x height; checked before the pixels are decoded."""
    timeout_s: float = Field(10.0, gt=0)
    """Longest silence of a server, in seconds."""
    deadline_s: float = Field(30.0, gt=0)
    """Longest time for one URL with its redirects and retries, in seconds."""
    max_bytes: int = Field(32 * 2**20, gt=0)
    """Largest accepted response body, in bytes."""
    retries: int = Field(1, ge=0, le=10)
    """How often a failure that may pass (time-out, connection, 429, 5xx) is tried again."""
    retry_wait_s: float = Field(0.5, ge=0)
    """Pause before the first retry, in seconds; doubled for each further one."""
    allowed_networks: tuple[str, ...] = ()
    """Networks that are not public but may be fetched from all the same: `127.0.0.1/32`."""
    user_agent_token: str = Field("evaclip", pattern=r"^[A-Za-z0-9._-]+$")
    """Who we say we are; X-Robots-Tag directives addressed to it are obeyed."""
    disallowed_directives: tuple[str, ...] = (
        "noai",
        "noimageai",
        "noindex",
        "noimageindex",
        "noml",
    )
    """X-Robots-Tag values with which a site declines use of its image."""
    min_success_rate: float = Field(0.3, ge=0, le=1)
    """Least share of rows that must become samples; fewer means that something is broken."""

    @field_validator("allowed_networks")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ip_network(network)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError("encode_quality of png is its compression: give 0 to 9")
        return self
