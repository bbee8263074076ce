"""What a merge is made from: sources, column maps, filters, target counts.

Covers: the pydantic models of the recipe's merge table.
Not here: any reading of files; see inputs.py and schema.py.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from evaclip_model.config import Config
from tasks.artifact import Stage

STAGE = Stage("merge", 1, tools=("duckdb",), ignores=("partitions", "memory_limit"))

Policy = Literal["keep", "drop"]


class ColumnMap(Config):
    """Which column of a source's parquet files plays which part."""

    url: str
    """Address of the image; text."""
    caption: str
    """Caption; text."""
    id: str | None = None
    """The collection's own row id; kept as text, breaks ties between duplicates."""
    width: str | None = None
    """Width in pixels, as published."""
    height: str | None = None
    """Height in pixels, as published."""
    similarity: str | None = None
    """Cosine similarity of image and caption, -1 to 1; anything else counts as unknown."""
    unsafe: tuple[str, ...] = ()
    """Columns that tell unsafe images: numbers are scores (0 safe, 1 unsafe), text is LAION's tag
    (UNLIKELY, UNSURE, NSFW). One unsafe column makes the row unsafe."""
    watermark: str | None = None
    """Watermark score, 0 to 1."""

    @field_validator("unsafe", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class SourceConfig(Config):
    """One metadata collection."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name in reports, folders and sampling weights, for example laion2b."""
    files: str = Field(min_length=1)
    """Glob of its parquet files; a leading `demo:` means inside the demo artifact. The flow finds
    them."""
    columns: Literal["auto", "laion", "coyo"] | ColumnMap = "auto"
    """Published layout (auto = told from the column names), or an explicit column map."""
    target_count: int | None = Field(default=None, gt=0)
    """At most so many rows are selected; none = all that pass."""


class FilterConfig(Config):
    """Rules a row must pass. A rule without a limit is off; a source is not judged by a rule
    whose column it does not have."""

    min_caption_chars: int = Field(default=3, ge=1)
    """Shortest caption, in characters after white space is tidied."""
    max_caption_chars: int | None = Field(default=1_000, ge=1)
    """Longest caption, in characters."""
    min_side: int | None = Field(default=None, ge=1)
    """Smallest published side in pixels; unknown sizes (none, 0) pass: the download measures."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Largest ratio of the longer to the shorter published side; unknown sizes pass."""
    min_similarity: float | None = Field(default=None, ge=-1, le=1)
    """Smallest image-caption similarity."""
    unknown_similarity: Policy = "drop"
    """What happens to rows whose similarity is none or not within -1 to 1, when it is judged."""
    max_unsafe: float | None = Field(default=0.5, ge=0, le=1)
    """Largest unsafe score; LAION recommends 0.5 for punsafe, COYO used 0.5 for both of its own."""
    unsafe_tags: tuple[str, ...] = ("NSFW",)
    """Tags that make a row unsafe, upper case; empty = tags are not judged."""
    unknown_unsafe: Policy = "drop"
    """What happens to rows with a score or tag missing (LAION's sidecar joins leave gaps)."""
    max_watermark: float | None = Field(default=0.8, ge=0, le=1)
    """Largest watermark score; LAION recommends 0.8."""
    unknown_watermark: Policy = "keep"
    """What happens to rows without a watermark score, when it is judged."""

    @model_validator(mode="after")
    def _captions_can_pass(self) -> Self:
        if self.max_caption_chars is not None and self.max_caption_chars < self.min_caption_chars:
            raise ValueError("max_caption_chars is smaller than min_caption_chars")
        return self


class MergeConfig(Config):
    """One merge. What decides its result is everything but `partitions` and `memory_limit`."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """In order of preference: of two rows with the same URL the earlier source's stays."""
    filters: FilterConfig = FilterConfig()
    """Rules before deduplication."""
    seed: int = 0
    """Decides which rows are selected, and their order. A larger target count with the same seed
    selects the same rows and more."""
    rows_per_file: int = Field(default=10_000, gt=0)
    """Rows of an output file; a multiple of the download's samples_per_shard."""
    partitions: int | None = Field(default=None, ge=1, le=4096)
    """Parts the keys are split into, one in memory at a time; none = one for 4 million rows."""
    memory_limit: str = Field(default="2GB", pattern=r"^[0-9]+(\.[0-9]+)? ?([KMGT]i?)?B$")
    """Memory of the database; what does not fit goes to disk."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are named '{twice[0]}'")
        return self
