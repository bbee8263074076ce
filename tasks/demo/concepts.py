"""The demo's concepts: names, captions and drawings in the committed `data/`.

Not here: building that data (`tests/tasks/demo/build_images.py`), URLs and metadata (`world.py`).
"""

import json
import zipfile
from pathlib import Path
from typing import Literal

from evaclip_model.config import Config

Artist = Literal["noto", "fluent", "twemoji"]
ARTISTS: tuple[Artist, ...] = ("noto", "fluent", "twemoji")
DATA = Path(__file__).parent / "data"
CONCEPTS_FILE = DATA / "concepts.json"


class Concept(Config):
    """One thing that all three artists drew."""

    key: str
    """Unicode code points in lower-case hex, joined by '-'; also the drawing's file name."""
    name: str
    """CLDR's English short name; unique, so it is the class name in evaluation."""
    noto: str
    """Caption of the Noto drawing: Unicode name, CLDR name where it differs, keywords."""
    fluent: str
    """Caption of the Fluent drawing: Fluent's own name of it, and keywords."""
    twemoji: tuple[str, ...]
    """Captions of the held-out Twemoji drawing, for retrieval."""
    fluent_phash: str
    """64-bit perceptual hash of the Fluent drawing, 16 hex digits."""


def read_concepts() -> tuple[Concept, ...]:
    """All concepts in Unicode's order."""
    entries = json.loads(CONCEPTS_FILE.read_text(encoding="utf-8"))
    return tuple(Concept.model_validate(entry) for entry in entries)


def artist_zip(artist: Artist) -> Path:
    return DATA / f"{artist}.zip"


def read_drawings(artist: Artist) -> dict[str, bytes]:
    """Concept key -> WebP bytes, 64 x 64 RGB on white."""
    with zipfile.ZipFile(artist_zip(artist)) as archive:
        return {
            name.removesuffix(".webp"): archive.read(name) for name in sorted(archive.namelist())
        }
