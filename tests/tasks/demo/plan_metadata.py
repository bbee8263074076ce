"""The plan of the demo's two metadata collections, oddities and all, and their parquet files in the
published columns of LAION-2B-en and COYO-700M: what made the committed `tasks/demo/data/metadata`.

Again: `python -m tests.tasks.demo.plan_metadata`. Not here: the artifact (tasks/demo/demo.py).

Nearly every concept has one sound row per source. A few of those are damaged, and further rows
are added that a pipeline must drop, fold together, or fail to download. The plan is a pure
function of the committed data and the port: which concept meets which oddity is decided by hashes.
Scores that only large models could give (similarities, safety, watermark, tokens) are made up from
hashes, in the published ranges; the perceptual hash is real.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.demo.config import DemoConfig
from tasks.demo.demo import DATA, Concept, read_concepts
from tests.tasks.merge.metadata import COYO_700M, LAION_2B

Source = Literal["laion2b", "coyo700m"]
ARTIST_OF: dict[Source, Literal["noto", "fluent"]] = {"laion2b": "noto", "coyo700m": "fluent"}

Route = Literal[
    "img", "moved", "gone", "busy", "page", "broken", "cut", "slow", "loop", "optout", "dead"
]
"""First part of a URL's path, which decides the server's answer; `dead` is a port without server.

img: the drawing. moved: redirect to it. gone: 404. busy: 503. page: an HTML page instead.
broken: half a file, complete as HTTP. cut: the connection ends half-way. slow: one byte at a time.
loop: redirects to itself. optout: the drawing, with a header that forbids use for training.
"""
WORKING: tuple[Route, ...] = ("img", "moved")
ROUTES: tuple[Route, ...] = get_args(Route)

DAMAGED: dict[Route, int] = {
    "moved": 16, "gone": 12, "page": 4, "broken": 4, "cut": 3, "busy": 3, "slow": 1, "loop": 1,
    "optout": 1,
}  # fmt: skip
"""Sound rows per source that get another route instead; all but `moved` are lost."""
ADDED: dict[Route, int] = {
    "gone": 60, "page": 16, "broken": 12, "cut": 8, "busy": 12, "slow": 2, "loop": 4, "optout": 4,
    "dead": 2,
}  # fmt: skip
"""Rows per source added on top, which cannot be downloaded."""

UNENCODED = 12
"""Sound rows per source whose URL holds spaces and non-ASCII letters as they are."""
ENTITIES = 6
"""Sound LAION rows whose caption holds HTML entities."""
REPEATED = 40
"""Rows per source that repeat a sound row exactly."""
RECAPTIONED = 30
"""Rows per source with a sound row's URL and another caption."""
SHARED = 40
"""COYO rows with the URL of a LAION row."""
SHARED_SPELT_OTHERWISE = 10
"""COYO rows with the URL of a LAION row, spelt otherwise."""
SPELLINGS_EACH = 8
"""Rows per source and spelling that name a sound row's URL in another spelling."""

DEAD_PORT = 9
"""Loopback port of the discard protocol, on which nothing listens."""
NOT_HTTP = (
    "",
    "not a url",
    "ftp://127.0.0.1/drawing.png",
    "data:image/png;base64,iVBORw0KGgo=",
    "file:///drawing.png",
    "http://",
)
"""URLs that no downloader may fetch."""
PARTS: dict[Source, int] = {"laion2b": 2, "coyo700m": 1}
"""Files per source; the published collections have 128 each."""
NSFW_TAG = {"safe": "UNLIKELY", "unsure": "UNSURE", "unsafe": "NSFW", None: None}
NSFW_SCORE = {"safe": 0.02, "unsure": 0.45, "unsafe": 0.95, None: None}


@dataclass(frozen=True)
class DemoRow:
    """One row of metadata, before it is written in its source's columns."""

    concept: Concept
    url: str | None
    caption: str | None
    similarity: float | None
    """Similarity of image and caption, as a CLIP ViT-B/32 would score; made up from a hash."""
    kind: str = "sound"
    """What is special about the row; for tests and for reading, never written."""
    width: int = 64
    height: int = 64
    safety: Literal["safe", "unsure", "unsafe"] | None = "safe"
    watermarked: bool = False


def plan_rows(source: Source, concepts: Sequence[Concept], port: int) -> list[DemoRow]:
    """All rows of a source, in the order in which its files hold them."""
    return _Planner(source, concepts, port).list_rows()


SPELLINGS: dict[str, Callable[[str], str]] = {
    "fragment": lambda url: url + "#top",
    "scheme-case": lambda url: url.replace("http://", "HTTP://", 1),
    "escaped-letter": lambda url: url.replace(".webp", ".%77ebp", 1),
    "https": lambda url: url.replace("http://", "https://", 1),
    "around-space": lambda url: f" {url} ",
}
"""Other spellings of a URL: by RFC 3986, section 6.2.2, or in practice (https), the same picture.

No server here speaks https, so a pipeline that keeps that spelling loses the picture."""


def _lengthen_caption(row: DemoRow) -> DemoRow:
    return replace(row, caption=f"{row.caption} " * 200)


FILTERED: dict[str, tuple[int, Callable[[DemoRow], DemoRow]]] = {
    "null-url": (4, lambda row: replace(row, url=None)),
    "null-caption": (6, lambda row: replace(row, caption=None)),
    "empty-caption": (4, lambda row: replace(row, caption="  ")),
    "short-caption": (10, lambda row: replace(row, caption="a")),
    "long-caption": (3, _lengthen_caption),
    "low-similarity": (30, lambda row: replace(row, similarity=0.1)),
    "null-similarity": (4, lambda row: replace(row, similarity=None)),
    "corrupt-similarity": (1, lambda row: replace(row, similarity=6016.0)),
    "unsafe": (12, lambda row: replace(row, safety="unsafe")),
    "unsure": (8, lambda row: replace(row, safety="unsure")),
    "null-safety": (2, lambda row: replace(row, safety=None)),
    "watermarked": (8, lambda row: replace(row, watermarked=True)),
    "tiny": (8, lambda row: replace(row, width=8, height=8)),
    "zero-size": (2, lambda row: replace(row, width=0, height=0)),
    "wide": (10, lambda row: replace(row, width=640, height=64)),
    "tall": (4, lambda row: replace(row, width=64, height=640)),
}
"""Rows per source added on top that a metadata filter may drop: how many, and what is odd."""


@dataclass(frozen=True)
class _Planner:
    source: Source
    concepts: Sequence[Concept]
    port: int

    def list_rows(self) -> list[DemoRow]:
        rows = [*self._one_each(), *self._added_rows()]
        order = [_hash_words(self.source, str(number)) for number in range(len(rows))]
        return [rows[number] for number in sorted(range(len(rows)), key=order.__getitem__)]

    def _one_each(self) -> list[DemoRow]:
        """One row per concept, a few of them damaged."""
        rows = {concept.key: self._make_row(concept, "img") for concept in self.concepts}
        spare = iter(_shuffle_concepts(self.concepts, self.source, "damaged"))
        for route, count in DAMAGED.items():
            for concept in _take_concepts(spare, count):
                rows[concept.key] = self._make_row(concept, route)
        for concept in _take_concepts(spare, UNENCODED):
            row = rows[concept.key]
            url = f"{row.url}?alt={concept.name} – Ünïcode"
            rows[concept.key] = replace(row, url=url, kind="unencoded")
        for concept in _take_concepts(spare, ENTITIES if self.source == "laion2b" else 0):
            row = rows[concept.key]
            caption = html.escape(f'"{concept.name}" & more: {row.caption}')
            rows[concept.key] = replace(row, caption=caption, kind="entities")
        return list(rows.values())

    def _added_rows(self) -> Iterator[DemoRow]:
        spare = iter(_shuffle_concepts(self.concepts, self.source, "added"))
        for route, count in ADDED.items():
            for concept in _take_concepts(spare, count):
                yield self._copy_row(concept, route, route)
        for kind, (count, odd) in FILTERED.items():
            if kind == "watermarked" and self.source == "laion2b":
                continue  # LAION-2B as first published has no watermark score
            for concept in _take_concepts(spare, count):
                yield odd(self._copy_row(concept, "img", kind))
        for concept, url in zip(_take_concepts(spare, len(NOT_HTTP)), NOT_HTTP, strict=True):
            yield replace(self._make_row(concept, "img"), url=url, kind="not-http")
        yield from self._repeated_rows()

    def _repeated_rows(self) -> Iterator[DemoRow]:
        sound = iter(_shuffle_concepts([*self._sound_concepts()], self.source, "repeats"))
        for concept in _take_concepts(sound, REPEATED):
            yield self._repeat_row(concept, "repeated")
        for concept in _take_concepts(sound, RECAPTIONED):
            yield replace(self._repeat_row(concept, "recaptioned"), caption=f"emoji {concept.name}")
        for spelling, respell in SPELLINGS.items():
            for concept in _take_concepts(sound, SPELLINGS_EACH):
                row = self._repeat_row(concept, spelling)
                yield replace(row, url=respell(row.url or ""))
        for row in self._one_each():
            if row.kind == "unencoded":
                url = quote(row.url or "", safe=":/?=&")
                escapes_in_lower_case = url.replace("%C3", "%c3").replace("%AF", "%af")
                yield replace(_less_similar(row), url=escapes_in_lower_case, kind="escape-case")
        if self.source == "coyo700m":
            yield from self._shared_rows()

    def _shared_rows(self) -> Iterator[DemoRow]:
        """Rows whose picture another source lists as well."""
        laion = _Planner("laion2b", self.concepts, self.port)
        sound = iter(_shuffle_concepts([*laion._sound_concepts()], self.source, "shared"))
        for concept in _take_concepts(sound, SHARED):
            yield replace(laion._repeat_row(concept, "shared"), caption=f"emoji {concept.name}")
        for concept in _take_concepts(sound, SHARED_SPELT_OTHERWISE):
            row = laion._repeat_row(concept, "shared-spelt-otherwise")
            url = SPELLINGS["fragment"](row.url or "")
            yield replace(row, url=url, caption=f"emoji {concept.name}")

    def _sound_concepts(self) -> Iterator[Concept]:
        return (row.concept for row in self._one_each() if row.kind == "sound")

    def _make_row(self, concept: Concept, route: Route) -> DemoRow:
        return DemoRow(
            concept=concept,
            url=self._make_url(concept, route),
            caption=concept.noto if self.source == "laion2b" else concept.fluent,
            similarity=0.30 + _hash_words(self.source, "similarity", concept.key) % 1000 / 1e4,
            kind="sound" if route == "img" else route,
        )

    def _copy_row(self, concept: Concept, route: Route, kind: str) -> DemoRow:
        """A further row with a URL of its own, so that it does not repeat the concept's row."""
        row = self._make_row(concept, route)
        return replace(row, url=f"{row.url}?copy={kind}", kind=kind)

    def _repeat_row(self, concept: Concept, kind: str) -> DemoRow:
        return replace(_less_similar(self._make_row(concept, "img")), kind=kind)

    def _make_url(self, concept: Concept, route: Route) -> str:
        port = DEAD_PORT if route == "dead" else self.port
        return f"http://127.0.0.1:{port}/{route}/{ARTIST_OF[self.source]}/{concept.key}.webp"


def _less_similar(row: DemoRow) -> DemoRow:
    """The same row, which loses against the original where the most similar one is kept."""
    return replace(row, similarity=(row.similarity or 0.0) - 0.01)


def _shuffle_concepts(concepts: Sequence[Concept], *salt: str) -> list[Concept]:
    return sorted(concepts, key=lambda concept: _hash_words(*salt, concept.key))


def _take_concepts(concepts: Iterator[Concept], count: int) -> list[Concept]:
    return [next(concepts) for _ in range(count)]


def _hash_words(*parts: str) -> int:
    """63 bits of SHA-256."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def write_metadata(
    source: Source, rows: Sequence[DemoRow], folder: Path, codec: str = "snappy"
) -> list[Path]:
    """Write the source's rows as `part-NNNNN.CODEC.parquet` files into `folder`."""
    schema, columns_of = WRITTEN_AS[source]
    folder.mkdir(parents=True, exist_ok=True)
    records = [columns_of(row, number) for number, row in enumerate(rows)]
    per_part = -(-len(records) // PARTS[source])
    paths = []
    for part in range(PARTS[source]):
        table = pa.Table.from_pylist(
            records[part * per_part : (part + 1) * per_part], schema=schema
        )
        path = folder / f"part-{part:05d}.{codec}.parquet"
        pq.write_table(table, path, compression=codec)
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
    "laion2b": (LAION_2B, laion_columns),
    "coyo700m": (COYO_700M, coyo_columns),
}


def _derive_bits(purpose: str, row: DemoRow, number: int) -> int:
    """63 bits that tell rows apart, also where they repeat each other."""
    text = f"{purpose}\0{row.concept.key}\0{row.kind}\0{number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


if __name__ == "__main__":
    for source in PARTS:
        rows = plan_rows(source, read_concepts(), DemoConfig().port)
        write_metadata(source, rows, DATA / "metadata" / source, "zstd")
