"""Metadata files in exactly the published schemas, for the tests of the merge."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.merge.config import MergeConfig

LAION_2B = pa.schema(
    [
        ("SAMPLE_ID", pa.int64()),
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("HEIGHT", pa.int32()),
        ("WIDTH", pa.int32()),
        ("LICENSE", pa.string()),
        ("NSFW", pa.string()),
        ("similarity", pa.float64()),
    ]
)
LAION_JOINED = pa.schema(
    [
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("WIDTH", pa.int32()),
        ("HEIGHT", pa.int32()),
        ("similarity", pa.float64()),
        ("hash", pa.int64()),
        ("pwatermark", pa.float32()),
        ("punsafe", pa.float32()),
    ]
)
COYO_700M = pa.schema(
    [
        ("id", pa.int64()),
        ("url", pa.string()),
        ("text", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("image_phash", pa.string()),
        ("text_length", pa.int64()),
        ("word_count", pa.int64()),
        ("num_tokens_bert", pa.int64()),
        ("num_tokens_gpt", pa.int64()),
        ("num_faces", pa.int64()),
        ("clip_similarity_vitb32", pa.float64()),
        ("clip_similarity_vitl14", pa.float64()),
        ("nsfw_score_opennsfw2", pa.float64()),
        ("nsfw_score_gantman", pa.float64()),
        ("watermark_score", pa.float64()),
        ("aesthetic_score_laion_v2", pa.float64()),
    ]
)
RELAION = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("similarity", pa.float64()),
        ("language", pa.string()),
    ]
)

DEFAULTS = {
    "HEIGHT": 300,
    "WIDTH": 400,
    "LICENSE": "?",
    "NSFW": "UNLIKELY",
    "similarity": 0.3,
    "pwatermark": 0.1,
    "punsafe": 0.1,
    "width": 400,
    "height": 300,
    "image_phash": "f" * 16,
    "clip_similarity_vitb32": 0.3,
    "nsfw_score_opennsfw2": 0.1,
    "nsfw_score_gantman": 0.1,
    "watermark_score": 0.1,
}


def write(path: Path, schema: pa.Schema, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows; columns they leave out get an ordinary value, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [
        pa.array([row.get(field.name, DEFAULTS.get(field.name)) for row in rows], field.type)
        for field in schema
    ]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), path, compression="snappy")
    return path


def laion(number: int, **values: Any) -> dict[str, Any]:
    """A LAION-2B row that passes every default rule."""
    url = f"http://host{number % 7}.example/{number}.jpg"
    return {"SAMPLE_ID": number, "URL": url, "TEXT": f"picture {number}", **values}


def coyo(number: int, **values: Any) -> dict[str, Any]:
    """A COYO-700M row that passes every default rule."""
    url = f"http://other{number % 5}.example/{number}.png"
    return {"id": number, "url": url, "text": f"photo {number}", **values}


def find_files(config: MergeConfig) -> dict[str, list[Path]]:
    """The files of every source's glob, as the flow finds them."""
    return {
        source.name: sorted(Path(name) for name in glob.glob(source.files))
        for source in config.sources
    }


def output_rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    """All rows of the merge's parquet files, in order."""
    parts = [path for path in files if path.suffix == ".parquet"]
    return [row for path in parts for row in pq.read_table(path).to_pylist()]
