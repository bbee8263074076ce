"""Settings of a join, none of which decides its result, and the names of what it makes.

Covers: the config, the stage's name and version.
Not here: joining.
"""

from __future__ import annotations

from pydantic import Field

from evaclip_model.config import Config
from tasks.artifacts.artifact import Stage

STAGE = Stage("join", 1, tools=("duckdb", "pyarrow"), ignores=("memory_limit",))
PARTS = "parts.json"
"""The verifications in order: digest, first row and first shard of each."""


class JoinConfig(Config):
    """Settings of a join; none changes its result."""

    memory_limit: str = Field(default="2GB", pattern=r"^[0-9]+(\.[0-9]+)? ?([KMGT]i?)?B$")
    """Memory for sorting the index; what does not fit goes to disk."""
