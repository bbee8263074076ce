"""Rules for downloading and storing images, the `[download]` table of a recipe; and, outside it,
the processes that download."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_network
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from tasks.artifacts.artifact import Stage

STAGE = Stage("download", 2, tools=("img2dataset", "webdataset", "pyarrow"))
Distributor = Literal["multiprocessing", "pyspark", "ray"]


class PolitenessConfig(Config):
    """The `[download.politeness]` table: what sites may expect of us."""

    host_connections: int = Field(8, gt=0)
    """Connections open at once to one host, in each downloading process."""
    rest_after: int = Field(5, gt=0)
    """After so many refusals for being busy (429, 503) in a row a host is left alone for a while;
    its URLs of that time are left to the next pass."""
    max_rest_s: float = Field(600.0, ge=0)
    """Longest time for which a host is left alone, in seconds."""
    retry_wait_s: float = Field(0.5, ge=0)
    """Pause before the first retry, in seconds; doubled for each further one. A server's
    Retry-After is waited for where it is longer, if the deadline lets us."""
    pass_wait_s: float = Field(60.0, ge=0)
    """Longest pause between two passes, in seconds; as long as servers asked for (Retry-After)."""
    user_agent_token: str = Field("evaclip", pattern=r"^[A-Za-z0-9._-]+$")
    """Who we say we are; X-Robots-Tag directives and robots.txt rules for it are obeyed."""
    contact: str = Field("", pattern=r"^[!-'*-~]*$")
    """URL or e-mail address at which sites can reach you, sent with every request; may be empty."""
    disallowed_directives: tuple[str, ...] = (
        "noai",
        "noimageai",
        "noindex",
        "noimageindex",
        "noml",
    )
    """X-Robots-Tag values with which a site declines use of its image."""
    respect_tdm: bool = True
    """Obey the headers `tdm-reservation: 1` (TDM Reservation Protocol) and `Content-Usage:
    train-ai=n` (IETF's AI preferences), which decline."""
    respect_robots: bool = False
    """Ask every host for its robots.txt first, with what it says about training (Content-Usage,
    Content-Signal); about one more request for every host and shard."""
    respect_ai_txt: bool = False
    """Ask every host for its ai.txt (Spawning) first, as for its robots.txt."""

    ADDED: ClassVar[tuple[str, ...]] = ("respect_ai_txt",)


class StorageConfig(Config):
    """The `[download.storage]` table: how images are resized and encoded."""

    resize_mode: Literal["keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"] = (
        "keep_ratio"
    )
    """How an image meets image_px, in img2dataset's words."""
    resize_only_if_bigger: bool = True
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int = Field(95, ge=0, le=100)
    """JPEG or WebP quality, 0 to 100; for png the compression, 0 to 9."""
    skip_reencode: bool = True
    """Store the original bytes when they have the format already and need no resizing."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError("encode_quality of png is its compression: give 0 to 9")
        return self


class DownloadConfig(Config):
    """The `[download]` table; defaults are what LAION's own downloads used, made safe."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        **{
            name: f"politeness.{name}"
            for name in PolitenessConfig.model_fields
            if name not in PolitenessConfig.ADDED
        },
        **{name: f"storage.{name}" for name in StorageConfig.model_fields},
    }

    samples_per_shard: int = Field(10_000, gt=0, le=100_000)
    """Rows of a shard, failed ones included; rows_per_file of the merge is a multiple of it."""
    image_px: int = Field(256, gt=0)
    """Length of the shorter (keep_ratio, center_crop) or longer side after resizing, in pixels."""
    storage: StorageConfig = StorageConfig()
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
    passes: int = Field(2, ge=1, le=10)
    """How often the whole list is gone through; after the first time only rows whose failure may
    pass (time-out, connection, 429, 5xx) are tried, in shards of their own."""
    politeness: PolitenessConfig = PolitenessConfig()
    allowed_networks: tuple[str, ...] = ()
    """Networks that are not public but may be fetched from all the same: `127.0.0.1/32`."""
    hash_column: str = ""
    """Column of the sources' metadata with the hash that the fetched bytes must have, in hex, or
    "image_hash" for what their column maps name so; rows without one pass; empty: no row is
    compared."""
    hash_algorithm: Literal["md5", "sha1", "sha256"] = "md5"
    min_success_rate: float = Field(0.3, ge=0, le=1)
    """Least share of rows that the first pass must make samples of; fewer means that something is
    broken."""

    @field_validator("allowed_networks")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ip_network(network)
        return value


@dataclass(frozen=True)
class Crew:
    """The processes and threads that download; they never change the result."""

    processes: int
    """Each with its own shard; about 0.8 GB of memory."""
    threads: int
    """Connections open at once in each process."""
    distributor: Distributor = "multiprocessing"
    """What starts the processes: Spark and Ray need a folder that all machines share."""


def require_distributor(name: Distributor) -> None:
    """Make sure that `name` can be used; img2dataset ends silently, having done nothing, if not."""
    if name != "multiprocessing" and find_spec(name) is None:
        raise InputError(
            f"the download distributor '{name}' needs the package {name}, which is not installed: "
            f"pip install {name}, or use 'multiprocessing'"
        )
    if name == "pyspark" and not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise InputError(
            "the download distributor 'pyspark' needs Java 17, but neither JAVA_HOME is set nor "
            "is there a java on the PATH: install it, or use 'multiprocessing'"
        )
    if name == "ray" and not os.environ.get("RAY_ADDRESS"):
        raise InputError(
            "the download distributor 'ray' needs a cluster, named by RAY_ADDRESS: one that Ray "
            "started by itself would listen on all networks of this machine; use 'multiprocessing'"
        )
