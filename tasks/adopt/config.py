"""Adopted data: the `[adopt]` table of a recipe. Not here: finding and packing."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from evaclip_model.config import Config, refuse_repeated_names
from tasks.artifacts.artifact import Stage
from tasks.tables.text_tables import Quoting

STAGE = Stage("adopt", 1, tools=("webdataset", "pyarrow"))

Form = Literal["shards", "folder", "table", "parquet"]


class AdoptedSource(Config):
    """One collection of images and captions that exists already."""

    ADDED: ClassVar[tuple[str, ...]] = ("within",)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name in reports, folders and sampling weights."""
    files: str = Field(min_length=1)
    """Where it lies: a glob ({000..099} included), a folder, a table, or a .txt file that lists the
    shards; a local path or a URL (s3://bucket/*.tar, hf://datasets/owner/name/*.parquet)."""
    form: Form | None = None
    """What it is; none: found by looking. shards: webdataset tars of image and .txt, which stay
    where they lie; folder: NAME.txt beside NAME.jpg; table: CSV, TSV, JSON Lines or parquet of
    image paths and captions; parquet: the images themselves in a column."""
    image: str | None = None
    """Column of the image or its path; none: found by its name or type."""
    caption: str | None = None
    """Column of the caption; none: found by its name."""
    image_root: str | None = None
    """Folder that a table's paths begin in; none: the table's own."""
    within: str | None = None
    """Folder or URL that a table's paths may not lead out of; none: the one that they begin in."""
    quoting: Quoting = "auto"
    """Whether double quotes enclose the values of a CSV; auto: in .csv yes, in .tsv where they
    can (tasks/tables/text_tables.py has the rule)."""
    header: bool = True
    """Whether a CSV's first line names the columns; if not, they are column0, column1, ..."""
    revision: str = ""
    """Which edition it is, for the dataset's card."""
    licence: str = ""
    """Its licence, for the dataset's card."""


class AdoptConfig(Config):
    sources: tuple[AdoptedSource, ...] = Field(min_length=1, max_length=32)
    """Collections, in order."""
    samples_per_shard: int = Field(1_000, gt=0, le=100_000)
    """Samples of a shard, where images must be packed."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        refuse_repeated_names("sources", [source.name for source in self.sources])
        return self
