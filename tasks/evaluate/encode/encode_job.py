"""What the ranks of an evaluation are told, as files.

Covers: the job, and the names of the files that each rank leaves beside it.
Not here: the work (encode_worker.py), deciding what it is (distributed.py); torch is not imported.
"""

from __future__ import annotations

from pathlib import Path

from evaclip_model.config import Config
from tasks.evaluate.config import Precision


class ImageWork(Config):
    """Blocks of one set's image features that one model has yet to make."""

    name: str
    listed: Path
    """File that says where the images are."""
    folder: Path
    """Where blocks go."""
    blocks: tuple[int, ...]
    count: int
    """Images in them."""
    crop_px: int = 0


class ModelWork(Config):
    """What one model has yet to encode."""

    name: str
    spec: str
    texts: Path | None
    """File of the texts, a JSON list; none if all are encoded."""
    text_count: int
    text_folder: Path
    images: tuple[ImageWork, ...]


class EncodeJob(Config):
    """Everything that is missing, and how it is shared out."""

    models: tuple[ModelWork, ...]
    ranks: int
    workers: int
    """Decoding threads of each rank."""
    device: str
    precision: Precision


def progress_file(job: Path, rank: int) -> Path:
    """How far a rank is."""
    return job.with_name(f"progress-{rank}.json")


def failed_file(job: Path, rank: int) -> Path:
    """Which sets a rank found unusable; it exists when the rank is through."""
    return job.with_name(f"failed-{rank}.json")


def sentence_file(job: Path, rank: int) -> Path:
    """What a rank has to say to the user, who must do something first."""
    return job.with_name(f"sentence-{rank}.txt")
