"""The rules by which verified samples are used: the `[dataset]` table of a recipe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import ByteSize, Field, TypeAdapter, model_validator

from evaclip_model.choices import Precision
from evaclip_model.config import Config
from evaclip_model.reading.samples import STORED
from tasks.artifacts.artifact import Stage

RULES_IN_FILES = ("evaluation_sets", "blocklists", "keep_uids", "drop_uids")
STAGE = Stage(
    "dataset",
    1,
    tools=("duckdb", "numpy", "pyarrow", "pillow", "torch"),
    # what the files hold is among the parents, so that moving one changes nothing
    ignores=(*RULES_IN_FILES, "takedowns", "memory_limit"),
)
REPORT = "report.json"
"""Counts by source, and the rules that the digest knows by their content."""
LEFT_OUT = "left_out.parquet"
"""(row of the index, reason) of every sample that is not used, by row."""
SEARCH = "search"
"""Folder of what a search needs until it is over: every feature, once for each cell it stays in."""
CAPTIONS = "captions"
"""Folder of further captions, a file a shard; in the report, the counts of every sidecar."""
TAKEN_DOWN = "takedowns.txt"
"""Every takedown that this version obeys, one a line."""


CaptionKey = Literal["uid", "sha256", "url", "key"]


class CaptionSource(Config):
    """One `[[captions]]` table of a recipe: further captions of samples that lie elsewhere."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """What training stages call them in `caption_weights`."""
    files: str = Field(min_length=1)
    """Glob of parquet, JSON Lines, CSV or TSV files, or a URL with wildcards."""
    key: CaptionKey | None = None
    """What a row names its sample by; key: that inside the shard, where only one sample has it.
    None: the first of uid, sha256, url and key that is a column."""
    key_column: str | None = None
    """The column of it; none: of the same name."""
    caption: str | None = None
    """Column of the caption, or of a list of them; none: found by its name."""
    source: str | None = None
    """The one source whose samples are meant; none: all."""

    @model_validator(mode="after")
    def _names_are_clear(self) -> Self:
        if self.name == STORED:
            raise ValueError(f"captions cannot be named '{STORED}': so is the one beside the image")
        if self.key_column is not None and self.key is None:
            raise ValueError(f"say what column '{self.key_column}' is: set 'key' too")
        return self


@dataclass(frozen=True)
class OutsideFiles:
    """Files that a dataset's rules name, found."""

    evaluation_sets: tuple[Path, ...] = ()
    blocklists: tuple[Path, ...] = ()
    keep_uids: tuple[Path, ...] = ()
    drop_uids: tuple[Path, ...] = ()
    captions: tuple[tuple[CaptionSource, tuple[str, ...]], ...] = ()
    """Sidecars and their files."""


@dataclass(frozen=True)
class Seen:
    """Scores and features by the first model of `[embed]`, and how to show it more."""

    scores: npt.NDArray[np.float32]
    """Of every row; NaN where there is none."""
    files: Sequence[tuple[Path, int]]
    """Features of a shard, and the row of its first sample."""
    find_model: Callable[[], str] = str
    """Returns what opens it."""
    precision: Precision = "fp32"
    device: str = "cpu"
    parts: npt.NDArray[np.int64] | int = 0
    """Number of every row's part, where each was scored by itself and a share is of each."""


class ScoreRules(Config):
    """Rules by a model's scores: in `[dataset]` of the first one of `[embed]`, in
    `[retrain]` of the champion, which judges what is new, once."""

    ADDED: ClassVar[tuple[str, ...]] = ("min_score", "keep_share")

    min_score: float | None = Field(None, ge=-1, le=1)
    """Samples whose image and caption are less alike are left out."""
    keep_share: float | None = Field(None, gt=0, le=1)
    """Of each source this share of what all other rules leave is used: the best scores and, among
    equal ones, the first uids."""

    @property
    def asks_scores(self) -> bool:
        """Return whether a rule needs scores."""
        return self.min_score is not None or self.keep_share is not None


class DatasetConfig(ScoreRules):
    ADDED: ClassVar[tuple[str, ...]] = (
        *("keep_uids", "drop_uids", *ScoreRules.ADDED),
        *("semantic_duplicates", "near_evaluation", "validation_share"),
    )

    exact_duplicates: Literal["drop", "keep"] = "drop"
    """Samples whose image has the same bytes as an earlier one's, as downloaded or as stored."""
    near_duplicates: Literal["drop", "keep"] = "keep"
    """Samples whose image looks like an earlier one's; takes 90 bytes of memory a sample."""
    evaluation_sets: tuple[str, ...] = ()
    """Folders of evaluation images or webdatasets; what has their bytes or their look is left
    out. A leading `demo:` means inside the demo artifact."""
    near_evaluation: float | None = Field(None, ge=0, le=90)
    """Degrees: samples whose image feature, by the first model of `[embed]`, lies within this angle
    of the feature of an image of `evaluation_sets` are left out."""
    semantic_duplicates: float | None = Field(None, ge=0, le=90)
    """Degrees: samples whose image feature lies within this angle of that of a better sample are
    left out. Better is the higher score and, among equal ones, what comes first in the index; it
    need not stay itself, so that of a chain the best stays."""
    max_distance: int = Field(4, ge=0, le=8)
    """Bits of the 64 of a perceptual hash in which two images that look alike may differ."""
    blocklists: tuple[str, ...] = ()
    """Text files with one MD5 or SHA-256 a line (hex, of the file as downloaded or of the stored
    image), as md5sum and sha256sum write them."""
    keep_uids: tuple[str, ...] = ()
    """Lists of uids, one a line or DataComp's .npy of pairs of uint64: only samples in them are
    used."""
    drop_uids: tuple[str, ...] = ()
    """Lists of the same forms: samples in them are not used."""
    takedowns: tuple[str, ...] = ()
    """Text files with one URL, uid or SHA-256 a line: samples that may be used no longer, and
    all samples with the same image."""
    validation_share: float = Field(0.0, ge=0, lt=1)
    """Share of the samples, by a hash of their uids, that training is never shown: what
    `[train.validation]` measures on. Copies of their images may be trained on where duplicates are
    kept."""
    memory_limit: str = Field(default="2GB", pattern=r"^[0-9]+(\.[0-9]+)? ?([KMGT]i?)?B$")
    """Memory of the database; what does not fit goes to disk. Masks take 3 bytes a sample more."""

    @property
    def asks_features(self) -> bool:
        """Return whether a rule needs the features of `[embed]`."""
        return self.semantic_duplicates is not None or self.near_evaluation is not None

    @property
    def memory_bytes(self) -> int:
        return TypeAdapter(ByteSize).validate_python(self.memory_limit)

    def without_scores(self) -> Self:
        """Return the rules of which versions with other scores and takedowns take the choice."""
        later = ("min_score", "keep_share", "takedowns", "validation_share")
        return self.model_copy(update={name: DatasetConfig().__dict__[name] for name in later})

    @model_validator(mode="after")
    def _nearness_has_images(self) -> Self:
        if self.near_evaluation is not None and not self.evaluation_sets:
            raise ValueError("near_evaluation needs evaluation_sets: name the images to keep off")
        return self
