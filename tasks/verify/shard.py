"""Look at one shard: read every sample, decode every image.

Covers: the verdict on a shard and on each of its samples.
Not here: which shards there are, the manifest (verify.py).
"""

from __future__ import annotations

import io
from collections import Counter
from enum import StrEnum
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from evaclip_model.config import Config
from evaclip_model.samples import BrokenShard, Sample, Shard, read_samples
from tasks.artifact import sha256_of
from tasks.verify.config import VerifyConfig


class Flaw(StrEnum):
    """Why a sample cannot be trained on."""

    UNDECODABLE = "undecodable"
    TOO_SMALL = "too_small"
    TOO_MANY_PIXELS = "too_many_pixels"
    EMPTY_CAPTION = "empty_caption"
    REPEATED_UID = "repeated_uid"


class Verdict(Config):
    """What was found in one shard."""

    path: str
    """Of the tar, relative to the manifest's folder."""
    shard: Shard | None
    """None if the shard is left out."""
    flaws: dict[Flaw, int]
    """Bad samples by reason; each counts once."""
    left_out: str | None
    """Why the shard is left out."""


def verify_shard(tar: Path, path: str, config: VerifyConfig) -> Verdict:
    """Read `tar` to its end; `path` is what the manifest will call it."""
    flaws: Counter[Flaw] = Counter()
    sources: set[str] = set()
    uids: set[str] = set()
    samples = 0
    try:
        for sample in read_samples(tar):
            samples += 1
            sources.add(str(sample.record["source"]))
            flaw = flaw_of(sample, uids, config)
            if flaw is not None:
                flaws[flaw] += 1
            uids.add(str(sample.record["uid"]))
    except BrokenShard as problem:
        return Verdict(path=path, shard=None, flaws=dict(flaws), left_out=str(problem))
    left_out = _why_left_out(samples, flaws.total(), sources, config)
    shard = None
    if left_out is None:
        size, sha256 = tar.stat().st_size, sha256_of(tar)
        (source,) = sources
        shard = Shard(path=path, source=source, samples=samples, bytes=size, sha256=sha256)
    return Verdict(path=path, shard=shard, flaws=dict(flaws), left_out=left_out)


def flaw_of(sample: Sample, seen_uids: set[str], config: VerifyConfig) -> Flaw | None:
    """The first thing that is wrong with a sample; None if nothing is."""
    if sample.record["uid"] in seen_uids:
        return Flaw.REPEATED_UID
    if not sample.caption.strip():
        return Flaw.EMPTY_CAPTION
    return _flaw_of_image(sample.image, config)


def _flaw_of_image(encoded: bytes, config: VerifyConfig) -> Flaw | None:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size
            if width * height > config.max_pixels:
                return Flaw.TOO_MANY_PIXELS
            image.convert("RGB")
    except Image.DecompressionBombError:
        return Flaw.TOO_MANY_PIXELS
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError):
        return Flaw.UNDECODABLE
    return Flaw.TOO_SMALL if min(width, height) < config.min_image_px else None


def _why_left_out(samples: int, bad: int, sources: set[str], config: VerifyConfig) -> str | None:
    if samples == 0:
        return "it holds no samples"
    if len(sources) > 1:
        return f"it mixes the sources {', '.join(sorted(sources))}"
    if bad == samples or bad > samples * config.max_bad_share:
        return f"{bad} of its {samples} samples are bad"
    return None
