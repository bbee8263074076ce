"""The demo's metadata as parquet files in the published columns of LAION-2B-en and COYO-700M.

Covers: column names, types and compression as published, and the values that the plan leaves open.
Not here: which rows there are (`web_plan.py`).

Scores that only large models could give (similarities, safety, watermark, tokens) are made up from
hashes, in the published ranges; the perceptual hash is real.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.demo.web_plan import DemoRow, Source

LAION_SCHEMA = pa.schema(
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
COYO_SCHEMA = pa.schema(
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
PARTS: dict[Source, int] = {"laion2b": 2, "coyo700m": 1}
"""Files per source; the published collections have 128 each."""
NSFW_TAG = {"safe": "UNLIKELY", "unsure": "UNSURE", "unsafe": "NSFW", None: None}
NSFW_SCORE = {"safe": 0.02, "unsure": 0.45, "unsafe": 0.95, None: None}


def write_metadata(source: Source, rows: Sequence[DemoRow], folder: Path) -> list[Path]:
    """Write the source's rows as `part-NNNNN.snappy.parquet` files into `folder`."""
    schema, columns_of = WRITTEN_AS[source]
    folder.mkdir(parents=True, exist_ok=True)
    records = [columns_of(row, number) for number, row in enumerate(rows)]
    per_part = -(-len(records) // PARTS[source])
    paths = []
    for part in range(PARTS[source]):
        table = pa.Table.from_pylist(
            records[part * per_part : (part + 1) * per_part], schema=schema
        )
        path = folder / f"part-{part:05d}.snappy.parquet"
        pq.write_table(table, path, compression="snappy")
        paths.append(path)
    return paths


def laion_columns(row: DemoRow, number: int) -> dict[str, Any]:
    return {
        "SAMPLE_ID": _derive_bits("laion-id", row, number),
        "URL": row.url,
        "TEXT": row.caption,
        "HEIGHT": row.height,
        "WIDTH": row.width,
        "LICENSE": "?",
        "NSFW": NSFW_TAG[row.safety],
        "similarity": row.similarity,
    }


def coyo_columns(row: DemoRow, number: int) -> dict[str, Any]:
    text = row.caption or ""
    words = len(text.split())
    return {
        "id": _derive_bits("coyo-id", row, number),
        "url": row.url,
        "text": row.caption,
        "width": row.width,
        "height": row.height,
        "image_phash": row.concept.fluent_phash,
        "text_length": len(text),
        "word_count": words,
        "num_tokens_bert": words + 2,
        "num_tokens_gpt": words + 1,
        "num_faces": 0,
        "clip_similarity_vitb32": row.similarity,
        "clip_similarity_vitl14": None if row.similarity is None else row.similarity - 0.05,
        "nsfw_score_opennsfw2": NSFW_SCORE[row.safety],
        "nsfw_score_gantman": NSFW_SCORE[row.safety],
        "watermark_score": 0.95 if row.watermarked else 0.05,
        "aesthetic_score_laion_v2": 4.0 + _derive_bits("aesthetic", row, number) % 200 / 100,
    }


WRITTEN_AS: Mapping[Source, tuple[pa.Schema, Callable[[DemoRow, int], dict[str, Any]]]] = {
    "laion2b": (LAION_SCHEMA, laion_columns),
    "coyo700m": (COYO_SCHEMA, coyo_columns),
}


def _derive_bits(purpose: str, row: DemoRow, number: int) -> int:
    """63 bits that tell rows apart, also where they repeat each other."""
    text = f"{purpose}\0{row.concept.key}\0{row.kind}\0{number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
