from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request

import pytest
from hypothesis import given, settings, strategies as st

from tasks.merge.database import load_statement, open_database
from tests.tasks.merge.reference import address_and_url, tidy

QUERY = (
    "WITH published AS (SELECT unnest($urls::VARCHAR[]) AS raw_url, "
    "unnest($captions::VARCHAR[]) AS raw_caption), "
    + load_statement("normalise")
    + " SELECT url, address, caption FROM normalised"
)

SCHEMES_AND_HOSTS = ["http://", "HTTPS://", "a.example", "Ä.example", "[::1]"]
PORTS_AND_MARKS = [":80", ":443", ":8080", ":0", "/", "?", "#", "@", "\\", "[", "]", "|", '"']
ESCAPES = ["%", "%41", "%c3%A4", "%7e", "%2F", "%zz", "..", "a", "b=c&d", "+", "'"]
DOTS = ["/..", "/.", "%2e", "."]
LETTERS = [" ", "\t", "\n", "\x00", "\x7f", "ä", "漢", "\U0001f600"]
pieces = st.sampled_from([*SCHEMES_AND_HOSTS, *PORTS_AND_MARKS, *ESCAPES, *DOTS, *LETTERS])
messy_urls = st.lists(pieces, max_size=12).map("".join) | st.lists(pieces, max_size=8).map(
    lambda parts: "http://a.example/" + "".join(parts)
)


@pytest.fixture(scope="module")
def normalise(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    spill: Path = tmp_path_factory.mktemp("spill")
    with open_database(spill, "200MB", 1) as connection:

        def call(url: str | None, caption: str | None = "a cat") -> tuple[str | None, ...]:
            [row] = connection.execute(QUERY, {"urls": [url], "captions": [caption]}).fetchall()
            return tuple(row)

        yield call


@pytest.mark.parametrize(
    ("published", "fetched"),
    [
        ("HTTP://Example.COM:80/A?b=C#d", "http://example.com/A?b=C"),
        ("https://example.com:443", "https://example.com/"),
        ("https://example.com:80/a", "https://example.com:80/a"),
        ("http://example.com?q=1", "http://example.com/?q=1"),
        (" http://example.com/a b.jpg\n", "http://example.com/a%20b.jpg"),
        ("http://example.com/ä/%c3%a4", "http://example.com/%C3%A4/%C3%A4"),
        ("http://example.com/%7Euser/%2Fx", "http://example.com/~user/%2Fx"),
        ("http://example.com/100%/%4", "http://example.com/100%25/%254"),
        ("http://example.com/a?b[]=1|2", "http://example.com/a?b%5B%5D=1%7C2"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://[2001:DB8::1]:8080/", "http://[2001:db8::1]:8080/"),
        ("http://a.example/%2541", "http://a.example/%2541"),
        ("http://a.example./b", "http://a.example/b"),
        ("http://faß.example/", "http://xn--fa-hia.example/"),
        ("http://a.example/b/../c/./d?e=/../f", "http://a.example/c/d?e=/../f"),
        ("http://a.example/b/%2e%2E", "http://a.example/"),
        ("http://a.example/.hidden/b", "http://a.example/.hidden/b"),
    ],
)
def test_a_url_is_ready_to_fetch(normalise, published: str, fetched: str) -> None:
    assert normalise(published)[0] == fetched


@pytest.mark.parametrize(
    "published",
    [
        "",
        "ftp://a.example/x",
        "file:///etc/passwd",
        "data:image/png;base64,AA",
        "a.example/x",
        "//a/x",
        "http:/a/b",
        "http://",
        "http:///x",
        "http://user:word@a.example/",
        "http://a.example:70000/",
        "http://a.example:x/",
        "http://a b.example/",
        "http://a%41.example/",
        "http://..ä/",
    ],
)
def test_what_no_web_server_can_be_asked_for_has_no_url(normalise, published: str) -> None:
    assert normalise(published)[:2] == (None, None)


def test_http_and_https_are_duplicates_of_each_other(normalise) -> None:
    assert normalise("http://a.example:80/x")[1] == normalise("https://a.example:443/x")[1]
    assert normalise("http://a.example:443/x")[1] != normalise("https://a.example/x")[1]


@settings(max_examples=300, deadline=None)
@given(url=messy_urls)
def test_sql_and_python_agree_on_messy_urls(normalise, url: str) -> None:
    expected = address_and_url(url)
    found_url, found_address, _ = normalise(url)
    assert (found_address, found_url) == (expected or (None, None))


@settings(max_examples=200, deadline=None)
@given(url=messy_urls)
def test_a_normal_form_stays_as_it_is_and_urllib_takes_it(normalise, url: str) -> None:
    once, address, _ = normalise(url)
    if once is not None:
        assert normalise(once)[:2] == (once, address)
        assert once.isascii() and " " not in once
        assert Request(once).host


@settings(max_examples=200, deadline=None)
@given(
    caption=st.text(max_size=12) | st.text(alphabet=" \t\u00a0\u2028\x00a\u200b\x85", max_size=8)
)
def test_captions_are_tidied_as_python_tidies_them(normalise, caption: str) -> None:
    assert normalise("http://a.example/", caption)[2] == tidy(caption)
