"""The join's stage, its version and the name of what it makes; it has no settings."""

from tasks.artifacts.artifact import Stage

STAGE = Stage("join", 1, tools=("duckdb", "pyarrow"))
PARTS = "parts.json"
"""The verifications in order: digest, first row and first shard of each."""
