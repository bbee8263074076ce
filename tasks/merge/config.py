"""Settings of a merge (the recipe's merge table): sources, column maps, filters, target counts; and
the published collections that are withdrawn, which it refuses.

In December 2023 suspected child sexual abuse material was found behind links of LAION-5B. LAION
took all its editions down; in August 2024 it published Re-LAION-5B without those links. There is
no public list of what was removed: an old copy is cleaned by keeping what Re-LAION still has.
"""

import math
import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from evaclip_model.config import Config, refuse_repeated_names
from tasks.artifacts.artifact import Stage
from tasks.tables.text_tables import Quoting

WITHDRAWN_NAMES = re.compile(r"(?i)\blaion/(laion-?(400m|[125]b)|laion-?(art|high-res|aesthetic))")
CLEANED = "laion/relaion2B-en-research-safe"
STAGE = Stage("merge", 2, tools=("duckdb",), ignores=("engine", "partitions", "memory_limit"))
MOST_ENTRIES = 2_000_000
Policy = Literal["keep", "drop"]


def why_refused(files: str) -> str | None:
    """The reason why these files cannot be a source; None when they can."""
    if "://" not in files or not WITHDRAWN_NAMES.search(files):
        return None
    return (
        f"'{files}' was withdrawn in December 2023 because it held links to suspected child "
        f"sexual abuse material: use its cleaned edition, hf://datasets/{CLEANED}/*.parquet"
    )


def _not_withdrawn(files: str) -> str:
    if reason := why_refused(files):
        raise ValueError(reason)
    return files


Published = Annotated[str, Field(min_length=1), AfterValidator(_not_withdrawn)]


class ColumnMap(Config):
    """The columns of a source's files by their meaning."""

    url: str
    caption: str
    id: str | None = None
    """The collection's own row id; kept as text, breaks ties between duplicates."""
    width: str | None = None
    """In pixels, as published, like the height."""
    height: str | None = None
    similarity: str | None = None
    """Cosine similarity of image and caption, -1 to 1; anything else counts as unknown."""
    unsafe: tuple[str, ...] = ()
    """Columns that tell unsafe images: numbers are scores (0 safe, 1 unsafe), text is LAION's tag
    (UNLIKELY, UNSURE, NSFW). One unsafe column makes the row unsafe."""
    watermark: str | None = None
    """Score, 0 to 1."""
    language: str | None = None
    """Of the caption, as the collection writes it; text."""
    image_hash: str | None = None
    """Hash of the image's bytes or look (md5, sha256, pHash) in hex, for the hash blocklists."""

    @field_validator("unsafe", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class SidecarConfig(Config):
    """Files that hold further columns of a source's rows, found by a key."""

    files: Published
    """Glob of the files, local or a URL."""
    on: Literal["laion_hash", "url", "id"] = "laion_hash"
    """What the key is: LAION's 64-bit hash of URL and caption (the source's `hash` column where it
    has one), the URL as published, or the row id."""
    key: str = "hash"
    """The sidecar's column that holds the key."""
    columns: tuple[str, ...] = Field(min_length=1)
    """Columns to add, for example punsafe and pwatermark. Rows without a partner get none, and the
    filter's `unknown_...` policy decides; of several partners the largest value counts."""


class SourceConfig(Config):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name in reports, folders and sampling weights, for example laion2b."""
    files: Published
    """Glob of its files: local, or a URL (s3://bucket/*.parquet, hf://datasets/owner/name/*); a
    leading `demo:` means inside the demo artifact."""
    format: Literal["auto", "parquet", "csv", "jsonl"] = "auto"
    """What the files are; auto = by their suffix, before a .gz or .zst."""
    columns: Literal["auto", "laion", "coyo"] | ColumnMap = "auto"
    """Published layout (auto = by the column names), or an explicit column map."""
    diff_against: Published | None = None
    """Glob of the cleaned edition's parquet files; rows whose address it lacks are dropped. Old
    copies of LAION's metadata are refused without it."""
    quoting: Quoting = "auto"
    """Whether double quotes enclose the values of a text file (tasks/tables/text_tables.py)."""
    header: bool = True
    """Whether a CSV's first line names the columns; if not, they are column0, column1, ..."""
    own_rows: bool = False
    """The rows are yours, only their columns have LAION's old names: nothing to compare with."""
    sidecars: tuple[SidecarConfig, ...] = ()
    revision: str = ""
    """Which edition the files are, for the dataset's card: a date, a commit, a release."""
    licence: str = ""
    """Licence of the metadata, for the dataset's card; images keep their owners' copyright."""
    target_count: int | None = Field(default=None, gt=0)
    """At most so many samples are wanted; none = all rows that pass are selected."""
    expected_success: float = Field(default=1.0, gt=0, le=1)
    """Share of selected rows that the download is expected to get; target_count divided by it is
    selected."""
    skip_count: int = Field(default=0, ge=0)
    """Back-fill: so many rows at the beginning of the selection order are left out, because an
    earlier merge with the same seed has given them."""

    ADDED: ClassVar[tuple[str, ...]] = ("quoting", "header")

    @property
    def wanted_rows(self) -> int | None:
        """The most rows that are selected; None: all that pass."""
        return self.target_count and math.ceil(self.target_count / self.expected_success)


class BlocklistConfig(Config):
    """Text files with one entry a line, or CSV files with a column of that name; empty lines and
    lines that begin with # do not count. What is not understood is refused by its line."""

    urls: tuple[str, ...] = ()
    """URLs, compared after normalisation: scheme, port and escapes do not matter."""
    domains: tuple[str, ...] = ()
    """Host names; a name blocks the hosts below it too. Hosts files and ad blockers' rules, too."""
    hashes: tuple[str, ...] = ()
    """Hashes in hex: md5 or sha256 of a URL (as published, or as fetched), or whatever the source's
    image_hash column holds."""


class FilterConfig(Config):
    """Rules a row must pass. A rule without a limit is off; a source is not judged by a rule
    whose column it does not have."""

    blocklists: BlocklistConfig = BlocklistConfig()
    min_caption_chars: int = Field(default=3, ge=1)
    """Shortest caption, in characters after white space is tidied."""
    max_caption_chars: int | None = Field(default=1_000, ge=1)
    """Longest caption, in characters."""
    languages: tuple[str, ...] = ()
    """Languages that are kept, as the source writes them; empty = all."""
    unknown_language: Policy = "keep"
    min_side: int | None = Field(default=None, ge=1)
    """Smallest published side in pixels; unknown sizes (none, 0) pass: the download measures."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Largest ratio of the longer to the shorter published side; unknown sizes pass."""
    min_similarity: float | None = Field(default=None, ge=-1, le=1)
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

    @model_validator(mode="after")
    def _captions_can_pass(self) -> Self:
        if self.max_caption_chars is not None and self.max_caption_chars < self.min_caption_chars:
            raise ValueError("max_caption_chars is smaller than min_caption_chars")
        return self


class BalanceConfig(Config):
    """MetaCLIP's balancing: of the rows that no other rule drops, about t stay of each entry that
    more hold, and none without an entry; all sources of a merge together, before target counts."""

    t: int = Field(gt=0)
    """Rows of an entry; MetaCLIP's 20,000 for 1.6 billion pairs. What a smaller one keeps is a part
    of what a larger one keeps."""
    entries: Annotated[str, Field(min_length=1)] | Annotated[int, Field(gt=0, le=MOST_ENTRIES)]
    """File with an entry a line, or .json with a list, as MetaCLIP's metadata.json; case counts. A
    number: so many words and pairs of words that most captions hold (derive_entries.sql)."""


class MergeConfig(Config):
    """One merge; `engine`, `partitions` and `memory_limit` alone do not decide its result."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1, max_length=32)
    """In order of preference: of two rows with the same URL the earlier source's stays."""
    filters: FilterConfig = FilterConfig()
    seed: int = 0
    """Decides which rows are selected, and their order. A larger target count with the same seed
    selects the same rows and more."""
    rows_per_file: int = Field(default=10_000, gt=0)
    """Rows of an output file; a multiple of the download's samples_per_shard."""
    engine: Literal["duckdb", "spark"] = "duckdb"
    """Where the units run: in DuckDBs here, or in those of the workers of the environment's Spark
    cluster (extra `spark`, Java 17). The rows are the same."""
    partitions: int | None = Field(default=None, ge=1, le=4096)
    """Parts the keys are split into, one in memory at a time; none = one for 250,000 rows,
    at most 2,048."""
    memory_limit: str = Field(default="2GB", pattern=r"^[0-9]+(\.[0-9]+)? ?([KMGT]i?)?B$")
    """Memory of the database; what does not fit goes to disk."""

    hash_column: str = ""
    """Column of the sources that goes into the rows as `image_hash`, for download.hash_column, from
    which a recipe fills it; a source without it has rows without a hash. Empty: no column."""

    balance: BalanceConfig | None = None

    ADDED: ClassVar[tuple[str, ...]] = ("hash_column", "balance")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        refuse_repeated_names("sources", [source.name for source in self.sources])
        return self
