from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings, strategies as st

from evaclip_model.errors import InputError
from tasks.merge.config import (
    BalanceConfig,
    BlocklistConfig,
    FilterConfig,
    MergeConfig,
    SourceConfig,
)
from tasks.merge.filters import REASONS
from tasks.merge.merge import merge_sources
from tests.tasks.merge import metadata, reference

URLS = [
    "http://a.example/1.jpg",
    "https://A.example/1.jpg",
    "HTTP://a.example:80/1.jpg#top",
    "http://a.example/%31.jpg",
    "http://a.example:443/1.jpg",
    "https://a.example:0443/1.jpg",
    "http://b.example/ä b.png",
    "http://b.example/%c3%a4%20b.png\n",
    "http://b.example?x=[1]",
    "http://b.example/?x=%5B1%5D",
    "https://bücher.example/1",
    "https://xn--bcher-kva.example/1",
    "http://127.1/1",
    "https://0x7f.0.0.1/1",
    "http://127.0.0.1./1",
    "http://[::0001]/1",
    "https://[::1]:443/1",
    "http://c.example/1",
    "http://c.example/2",
    "http://c.example/3",
    "http://c.example/4",
    "http://c.example/http://d.example/1",
    "ftp://c.example/1",
    "file:///etc/passwd",
    "http://user:word@c.example/1",
    "http:///1",
    " ",
    None,
]
CAPTIONS = ["a cat", "a  cat ", "a\u00a0dog\x00", "no", "", " \n", None, "x" * 40, "drei Bücher"]
CAPTIONS += ["a cat, a dog", "a cat a dog.", "no:cat;a", "a a a cat"]
ENTRIES = ["a", "cat", "a cat", "a cat a", "a a", "dog", "Bücher", "cat ,  a", ",", "it's", "A cat"]
SCORES = [None, 0.0, 0.4, 0.6, 1.0, float("nan")]
SIMILARITIES = [None, 0.1, 0.3, 0.3, 0.5, -0.2, 6016.0, float("nan")]
SIDES = [None, 0, 90, 200, 700]

urls = st.sampled_from(URLS) | st.integers(0, 60).map(lambda number: f"http://d.example/{number}")
policies = st.sampled_from(["keep", "drop"])
laion_rows = st.fixed_dictionaries(
    {
        "SAMPLE_ID": st.none() | st.integers(1, 20),
        "URL": urls,
        "TEXT": st.sampled_from(CAPTIONS),
        "WIDTH": st.sampled_from(SIDES),
        "HEIGHT": st.sampled_from(SIDES),
        "NSFW": st.sampled_from(["UNLIKELY", "UNLIKELY", "unsure", "NSFW", " NSFW ", "?", None]),
        "similarity": st.sampled_from(SIMILARITIES),
    }
)
joined_rows = st.fixed_dictionaries(
    {
        "hash": st.none() | st.integers(-5, 5),
        "URL": urls,
        "TEXT": st.sampled_from(CAPTIONS),
        "WIDTH": st.sampled_from(SIDES),
        "HEIGHT": st.sampled_from(SIDES),
        "similarity": st.sampled_from(SIMILARITIES),
        "punsafe": st.sampled_from(SCORES),
        "pwatermark": st.sampled_from(SCORES),
    }
)
coyo_rows = st.fixed_dictionaries(
    {
        "id": st.integers(1, 20),
        "url": urls,
        "text": st.sampled_from(CAPTIONS),
        "width": st.sampled_from(SIDES),
        "height": st.sampled_from(SIDES),
        "clip_similarity_vitb32": st.sampled_from(SIMILARITIES),
        "nsfw_score_opennsfw2": st.sampled_from(SCORES),
        "nsfw_score_gantman": st.sampled_from(SCORES),
        "watermark_score": st.sampled_from(SCORES),
        "image_phash": st.sampled_from([None, "0011223344556677", "ffeeddccbbaa9988"]),
    }
)
relaion_rows = st.fixed_dictionaries(
    {
        "url": urls,
        "caption": st.sampled_from(CAPTIONS),
        "similarity": st.sampled_from(SIMILARITIES),
        "language": st.sampled_from(["en", "en", "de", " ", None]),
    }
)
LAYOUTS = {
    "laion2b": (metadata.LAION_2B, laion_rows),
    "joined": (metadata.LAION_JOINED, joined_rows),
    "coyo": (metadata.COYO_700M, coyo_rows),
    "relaion": (metadata.RELAION, relaion_rows),
}
NAMES = {
    "laion2b": {"url": "URL", "caption": "TEXT", "id": "SAMPLE_ID"}
    | {"width": "WIDTH", "height": "HEIGHT", "similarity": "similarity"},
    "joined": {"url": "URL", "caption": "TEXT", "id": "hash"}
    | {"width": "WIDTH", "height": "HEIGHT", "similarity": "similarity"}
    | {"watermark": "pwatermark"},
    "coyo": {"url": "url", "caption": "text", "id": "id"}
    | {"width": "width", "height": "height", "similarity": "clip_similarity_vitb32"}
    | {"watermark": "watermark_score", "image_hash": "image_phash"},
    "relaion": {"url": "url", "caption": "caption", "similarity": "similarity"}
    | {"language": "language"},
}
TAGS = {"laion2b": ["NSFW"]}
UNSAFE_SCORES = {"joined": ["punsafe"], "coyo": ["nsfw_score_opennsfw2", "nsfw_score_gantman"]}

filters = st.builds(
    FilterConfig,
    min_caption_chars=st.integers(1, 5),
    max_caption_chars=st.sampled_from([None, 30]),
    languages=st.sampled_from([(), ("en",), ("en", "de")]),
    unknown_language=policies,
    min_side=st.sampled_from([None, 100]),
    max_aspect=st.sampled_from([None, 1.0, 3.0]),
    min_similarity=st.sampled_from([None, None, 0.2, 0.3]),
    unknown_similarity=policies,
    max_unsafe=st.sampled_from([None, 0.5]),
    unsafe_tags=st.sampled_from([(), ("NSFW",), ("NSFW", "UNSURE")]),
    unknown_unsafe=policies,
    max_watermark=st.sampled_from([None, 0.5]),
    unknown_watermark=policies,
)


blocklists = st.builds(
    reference.Blocked,
    urls=st.just(()) | st.just(("https://D.example/%37", "non.sense")),
    domains=st.just(()) | st.sampled_from([("B.example", "co.uk"), ("example",)]),
    hashes=st.just(())
    | st.just(("FFEEDDCCBBAA9988", hashlib.md5(b"http://d.example/5").hexdigest())),
)


@st.composite
def merges(
    draw: st.DrawFn,
) -> tuple[MergeConfig, dict[str, list[list[dict[str, Any]]]], reference.Blocked, list[str]]:
    names = draw(st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=3, unique=True))
    content = {
        name: draw(
            st.lists(st.lists(LAYOUTS[name][1], min_size=1, max_size=40), min_size=1, max_size=2)
        )
        for name in names
    }
    config = MergeConfig(
        sources=tuple(
            SourceConfig(
                name=name,
                files="-",
                own_rows=True,
                target_count=draw(st.none() | st.integers(1, 15)),
                expected_success=draw(st.sampled_from([1.0, 0.7])),
                skip_count=draw(st.sampled_from([0, 0, 3])),
            )
            for name in names
        ),
        filters=draw(filters),
        seed=draw(st.integers(-3, 1 << 40)),
        rows_per_file=draw(st.integers(1, 7)),
        balance=draw(st.none() | st.just(BalanceConfig(t=draw(st.integers(1, 9)), entries="-"))),
        partitions=draw(st.integers(1, 3)),
    )
    entries = draw(st.lists(st.sampled_from(ENTRIES), min_size=1, unique=True))
    return config, content, draw(blocklists), entries


def common_names(name: str, row: dict[str, Any]) -> dict[str, Any]:
    named = {part: row[column] for part, column in NAMES[name].items()}
    scores = [row[column] for column in UNSAFE_SCORES.get(name, [])]
    return {
        **dict.fromkeys(["id", "width", "height", "similarity", "language", "image_hash"]),
        **named,
        "watermark": _number(named.get("watermark")),
        "unsafe_scores": [_number(score) for score in scores],
        "unsafe_tags": [row[column] for column in TAGS.get(name, [])],
    }


def with_blocklists(config: MergeConfig, lists: reference.Blocked, folder: Path) -> MergeConfig:
    """The config with the entries in files."""
    paths: dict[str, tuple[str, ...]] = {}
    for kind, entries in lists._asdict().items():
        path = folder / f"{kind}.txt"
        path.write_text("# not an entry\n\n" + "".join(f" {entry}\n" for entry in entries))
        paths[kind] = (str(path),) if entries else ()
    filters = config.filters.model_copy(update={"blocklists": BlocklistConfig(**paths)})
    return config.model_copy(update={"filters": filters})


def _number(value: float | None) -> float | None:
    return None if value is None or value != value else value


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(merges())
def test_the_merge_equals_a_plain_python_merge_row_by_row(
    merge: tuple[MergeConfig, dict[str, list[list[dict[str, Any]]]], reference.Blocked, list[str]],
) -> None:
    config, content, lists, entries = merge
    rows = {
        name: [[common_names(name, row) for row in file] for file in files]
        for name, files in content.items()
    }
    has = {name: set(NAMES[name]) for name in content}
    expected, dropped = reference.merge(config, rows, has, lists, entries=entries)
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            name: [
                metadata.write(Path(folder, name, f"{number}.parquet"), LAYOUTS[name][0], file)
                for number, file in enumerate(files)
            ]
            for name, files in content.items()
        }
        config = with_blocklists(config, lists, Path(folder))
        if config.balance:
            listed = Path(folder, "entries.txt")
            listed.write_text("\n".join(entries))
            balance = config.balance.model_copy(update={"entries": str(listed)})
            config = config.model_copy(update={"balance": balance})
        out = Path(folder, "out")
        out.mkdir()
        emptied = [name for name, kept in expected.items() if not kept]
        try:
            made = merge_sources(config, paths, out, threads=1)
        except InputError as error:
            assert any(f"source '{name}' has no row left" in str(error) for name in emptied), error
            return
        assert not emptied
        report = json.loads((out / "report.json").read_text())
        others = {"report.json", "inputs.json"} | ({"entries.json"} if config.balance else set())
        assert {path.name for path in out.iterdir()} == {*content, *others}
        for source in report["sources"]:
            name = source["name"]
            files = sorted((out / name).iterdir())
            assert metadata.output_rows(files) == expected[name]
            assert list(source["dropped"]) == list(REASONS)
            assert +Counter(source["dropped"]) == dropped[name]
            assert source["rows_read"] == sum(map(len, rows[name]))
            sizes = [len(metadata.output_rows([path])) for path in files]
            assert all(size == config.rows_per_file for size in sizes[:-1])
        assert made.counts["selected"] == sum(map(len, expected.values()))
