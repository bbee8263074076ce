"""The tokenizer against ids made by the authors' own code, and against open_clip's tokenizer."""

from __future__ import annotations

import html
import importlib.util
import json
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ftfy
import ftfy.badness
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from evaclip_model.errors import InputError
from evaclip_model.tokenizer import tokenizer
from evaclip_model.tokenizer.bundled_assets import package_file
from evaclip_model.tokenizer.tokenizer import CONTEXT_LENGTH, END_TOKEN, START_TOKEN, tokenize

EXPECTED = json.loads((Path(__file__).parent / "data" / "tokenizer" / "tokens.json").read_text())


@pytest.fixture(scope="module")
def theirs():
    """open_clip's tokenizer, its module run on its own: the package would import torchvision."""
    spec = importlib.util.spec_from_file_location("tokens", package_file("tokenizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def test_every_caption_gets_the_original_ids():
    assert len(EXPECTED) == 100
    for text, ids in EXPECTED.items():
        row = tokenize(text)[0].tolist()
        assert row == ids + [0] * (CONTEXT_LENGTH - len(ids)), text


def test_a_batch_equals_its_captions_one_by_one():
    texts = list(EXPECTED)
    assert torch.equal(tokenize(texts), torch.cat([tokenize(text) for text in texts]))


WRITING = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from("aZ9 '&;#<>_-.!\t\n\r\x0b\x1c\x1f\x7f\x85\xa0\u200b\u2028\u3000\ufeff"),
        st.sampled_from("ſKİıßẞΣσςǅﬁﬅᏸꭰÅéêØŒœÃÂâ€™“”‘’…°º×²½Ⅷ٣३\u0301\u0338\u1100\ufe0f👍🏽"),
    )
)
PARTS = st.sampled_from(
    [
        "<start_of_text>",
        "<end_of_text>",
        "<END_OF_TEXT>",
        "!<end_of_text>",
        "<ſtart_of_text>",
        "&amp;",
        "&amp;amp;eacute;",
        "&lt;b&gt;",
        "&notit;",
        "&#x1F600;",
        "&#0;",
        "&#28;",
        "&#55357;",
        "a & b",
        "R&D",
        "it's",
        "IT'S",
        "it'ſ",
        "'LL",
        "dâ€™or",
        "schön",
        "Ã©t",
        "größe",
        "naïve café",
        "“quoted”",
        "Москва",
        "Αθήνα ΣΑΣ",
        "東京タワー",
        "한국",
        "שלום",
        "مرحبا",
        "12½",
        "a" * 90,
        "日" * 40,
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.lists(st.one_of(WRITING, PARTS)).map(" ".join), min_size=1, max_size=4))
@example(["Í\x85", "a\u0345b \u0345"])
@example(["", " ", "\t\n", "word " * 100, "x<end_of_text>y"])
def test_any_text_gets_open_clips_ids(theirs, texts):
    assert torch.equal(tokenize(texts), theirs(texts))


@pytest.mark.parametrize("context_length", [2, 3, 8, 30])
def test_any_context_length_cuts_as_open_clip_does(theirs, context_length):
    texts = ["", "a", "a photo of a cat", "a photo of many different animals, " * 4]
    assert torch.equal(tokenize(texts, context_length), theirs(texts, context_length))


def test_every_character_gets_open_clips_ids(theirs):
    points = (chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000)
    used = [c for c in points if unicodedata.category(c) not in ("Cn", "Co")]
    rare = [c for c in used if not "\u4e00" <= c <= "\ud7a3"]  # many alike: ideographs, Hangul
    texts = [f"a{character}b {character}" for character in rare[:: len(rare) // 8000]]
    assert torch.equal(tokenize(texts), theirs(texts))


def test_text_whose_cleaning_is_skipped_would_stay_as_it_is():
    """Every character alone, and all pairs of those ftfy knows from wrong encodings.

    Its signs of a wrong encoding look at neighbours; the other repairs at single characters.
    """
    is_skipped = tokenizer._UNCHANGED.match
    plain = [c for c in map(chr, range(0x20000)) if is_skipped(c) and c != "&"]
    assert len(plain) > 30_000
    alone = "x".join(plain)
    repaired = alone.translate(tokenizer._STRAIGHT).replace("\r", "\n")
    assert html.unescape(ftfy.fix_text(alone)) == repaired

    known = [c for c in plain if "\x80" <= c < "\u2600"]
    pairs = [first + second for first in known for second in known]
    around = [(before, after) for before in ("", "a", " ") for after in ("", "a", " ")]
    skipped = [
        text for a, z in around for text in (a + pair + z for pair in pairs) if is_skipped(text)
    ]
    assert len(skipped) > 100_000
    assert not any(map(ftfy.badness.is_bad, skipped))
    assert all(unicodedata.is_normalized("NFC", text) for text in skipped)


def test_common_captions_are_not_repaired(monkeypatch):
    monkeypatch.setattr(ftfy, "fix_text", None)
    captions = [
        "Salt & pepper, 5% off!",
        "“It’s” – a hot café",
        "größte Straße",
        "東京タワー 🗼",
        "Москва",
    ]
    assert tokenize(captions).shape == (5, CONTEXT_LENGTH)


def test_threads_may_share_the_table_and_it_may_start_anew(monkeypatch):
    texts = [f"{word} number{number}" for number in range(300) for word in ("cat", "zebra's")]
    expected = tokenize(texts)
    monkeypatch.setattr(tokenizer, "MOST_WORDS", 50)
    table = tokenizer._Words()
    monkeypatch.setattr(tokenizer, "_load_words", lambda: table)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # as on a machine that is busy
    with ThreadPoolExecutor(4) as pool:
        rows = [rows for _ in range(3) for rows in pool.map(tokenize, texts)]
    sys.setswitchinterval(usual)
    assert torch.equal(torch.cat(rows), expected.repeat(3, 1))
    assert len(table) < 60


def test_a_shorter_context_cuts_the_end_and_keeps_the_end_token():
    assert tokenize("a photo of a cat", 4).tolist() == [[START_TOKEN, 320, 1125, END_TOKEN]]


def test_no_captions_are_no_rows():
    assert tokenize([]).shape == (0, CONTEXT_LENGTH)
    assert tokenize([""]).tolist() == [[START_TOKEN, END_TOKEN, *[0] * 75]]


def test_a_context_without_room_for_the_ends_is_a_mistake():
    with pytest.raises(InputError, match="context_length is 1"):
        tokenize("a cat", 1)


def test_a_missing_vocabulary_is_named(monkeypatch):
    monkeypatch.setattr(tokenizer.assets, "package_file", lambda name: None)
    with pytest.raises(InputError, match="install open_clip_torch"):
        tokenizer._Words()


def test_the_package_that_ships_the_vocabulary_is_not_imported():
    code = (
        "import sys; from evaclip_model.tokenizer.tokenizer import tokenize; tokenize('a cat');"
        "assert 'open_clip' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
