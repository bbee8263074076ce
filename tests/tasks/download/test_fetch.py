"""Fetching over real HTTP on loopback: what works, and all that is refused."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from datetime import UTC, datetime

import pytest

from tasks.download.config import DownloadConfig
from tasks.download.fetch import Fetcher, retry_after
from tasks.download.fetch_outcome import Outcome, outcome_of, retry_after_s, with_retry_after

CONFIG = DownloadConfig(
    allowed_networks=("127.0.0.1/32",),
    max_bytes=100_000,
    timeout_s=0.4,
    deadline_s=0.8,
    retries=0,
    politeness={"retry_wait_s": 0.01},
)


def with_(**changes: object) -> DownloadConfig:
    settings = CONFIG.model_dump()
    for name in [name for name in changes if name in settings["politeness"]]:
        settings["politeness"][name] = changes.pop(name)
    return DownloadConfig.model_validate({**settings, **changes})


def fetch(
    url: str, config: DownloadConfig = CONFIG, digest: str | None = None
) -> tuple[bytes | None, Outcome]:
    body, message = Fetcher(config).fetch_image(url, digest)
    return body, outcome_of("success" if message is None else "failed", message)


def test_a_picture_comes_whole(web) -> None:
    body, word = fetch(web.url("ok/7.jpg"))
    assert word is Outcome.SUCCESS
    assert body is not None
    assert body[:2] == b"\xff\xd8"


def test_a_redirect_to_an_allowed_address_is_followed(web) -> None:
    assert fetch(web.url("redirect/" + web.url("ok/7.jpg")))[0] == fetch(web.url("ok/7.jpg"))[0]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nothing", Outcome.NOT_FOUND),
        ("circle", Outcome.REDIRECT_LOOP),
        ("busy/0/9", Outcome.RATE_LIMITED),
        ("broken", Outcome.SERVER_ERROR),
        ("noai", Outcome.OPTED_OUT),
        ("noml", Outcome.OPTED_OUT),
        ("tdm", Outcome.OPTED_OUT),
        ("html", Outcome.NOT_AN_IMAGE_TYPE),
        ("svg", Outcome.NOT_AN_IMAGE_TYPE),
        ("short", Outcome.INCOMPLETE),
        ("huge", Outcome.TOO_MANY_BYTES),
        ("unsized", Outcome.TOO_MANY_BYTES),
        ("endless", Outcome.TOO_MANY_BYTES),
        ("silence", Outcome.TIMEOUT),
        ("drip", Outcome.DEADLINE),
        ("headerdrip", Outcome.DEADLINE),
    ],
)
def test_faults_of_the_web_have_their_word(web, path: str, expected: Outcome) -> None:
    assert fetch(web.url(path)) == (None, expected)


def test_a_dripping_server_is_left_at_the_deadline(web) -> None:
    began = time.monotonic()
    fetch(web.url("drip"))
    assert time.monotonic() - began < CONFIG.deadline_s + 0.5


@pytest.mark.parametrize("host", ["127.0.0.2", "[::1]", "2130706434"])
def test_a_redirect_cannot_leave_the_allowed_network(web, host: str) -> None:
    url = web.url(f"redirect/http://{host}:{web.port}/ok/7.jpg")
    assert fetch(url) == (None, Outcome.ADDRESS_REFUSED)


def test_nothing_is_allowed_on_loopback_unless_it_is_said(web) -> None:
    assert fetch(web.url("ok/7.jpg"), with_(allowed_networks=())) == (None, Outcome.ADDRESS_REFUSED)


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "data:image/png;base64,AA", "ftp://127.0.0.1/x"]
)
def test_only_http_and_https_are_opened(url: str) -> None:
    assert fetch(url) == (None, Outcome.BAD_URL)


def test_credentials_of_an_address_are_never_sent(web) -> None:
    named = web.url("ok/7.jpg").replace("://", "://me:secret@")
    asked = sum(web.hits.values())
    assert fetch(named) == (None, Outcome.BAD_URL)
    assert asked == sum(web.hits.values())
    assert fetch(web.url(f"redirect/{named}")) == (None, Outcome.BAD_URL)


def test_a_redirect_to_ftp_or_a_file_is_not_followed(web) -> None:
    for target in ("ftp://127.0.0.1/x", "file:///etc/hostname"):
        assert fetch(web.url(f"redirect/{target}"))[0] is None


def test_a_proxy_of_the_environment_is_ignored(web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetch(web.url("ok/7.jpg"))[1] is Outcome.SUCCESS


def test_a_failure_that_may_pass_is_tried_again_and_others_are_not(web) -> None:
    patient = with_(deadline_s=2.0, retries=2)
    assert fetch(web.url("flaky/one"), patient)[1] is Outcome.SUCCESS
    assert web.hits["/flaky/one"] == 2
    assert fetch(web.url("gone/one"), patient)[1] is Outcome.NOT_FOUND
    assert web.hits["/gone/one"] == 1


def test_retries_end_with_the_deadline(web) -> None:
    hasty = with_(deadline_s=0.7, retries=10, retry_wait_s=0.2)
    began = time.monotonic()
    assert fetch(f"http://127.0.0.1:{closed_port()}/", hasty)[1] is Outcome.CONNECTION
    assert time.monotonic() - began < 1.0


def test_a_wait_that_the_server_asked_for_is_kept_if_the_deadline_lets_us(web) -> None:
    patient = with_(deadline_s=3.0, retries=1)
    began = time.monotonic()
    assert fetch(web.url("busy/1/1"), patient)[1] is Outcome.SUCCESS
    assert 1.0 <= time.monotonic() - began < 2.5
    body, message = Fetcher(patient).fetch_image(web.url("busy/60/1"))
    assert (body, retry_after_s(message)) == (None, 60.0)
    assert web.hits["/busy/60/1"] == 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("Mon, 02 Mar 2026 10:00:30 GMT", 30.0),
        ("Mon, 02 Mar 2026 09:00:00 GMT", 0.0),
        ("soon", None),
        ("-5", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, datetime(2026, 3, 2, 10, 0, 0, tzinfo=UTC)) == seconds


def test_a_servers_own_words_are_not_taken_for_ours(web) -> None:
    body, message = Fetcher(with_(retries=1)).fetch_image(web.url("jester"))
    assert body is None and message is not None and len(message) <= 500
    assert (outcome_of("failed", message), retry_after_s(message)) == (Outcome.RATE_LIMITED, 0.0)
    assert retry_after_s("HTTP Error 429: (retry after 1.2.3 s)") == 0.0
    assert retry_after_s(with_retry_after("HTTP Error 429: Busy", 2e6)) == 2e6


def test_a_host_that_is_busy_again_and_again_is_left_alone(web) -> None:
    fetcher = Fetcher(with_(rest_after=3, max_rest_s=30.0))
    outcomes = [fetcher.fetch_image(web.url(f"busy/20/99/{number}"))[1] for number in range(6)]
    assert sum(web.hits[f"/busy/20/99/{number}"] for number in range(6)) == 3
    assert [outcome_of("failed", message) for message in outcomes] == [Outcome.RATE_LIMITED] * 6


def test_bytes_that_are_not_what_the_list_says_are_refused(web) -> None:
    body, _ = fetch(web.url("ok/7.jpg"))
    assert body is not None
    right = hashlib.md5(body).hexdigest()
    assert fetch(web.url("ok/7.jpg"), digest=right.upper())[1] is Outcome.SUCCESS
    assert fetch(web.url("ok/7.jpg"), digest="0" * 32) == (None, Outcome.HASH_MISMATCH)
    sha = with_(hash_algorithm="sha256")
    assert fetch(web.url("ok/7.jpg"), sha, hashlib.sha256(body).hexdigest())[0] == body


def test_robots_txt_is_asked_for_once_and_obeyed(web) -> None:
    fetcher = Fetcher(with_(respect_robots=True))
    assert fetcher.fetch_image(web.url("ok/7.jpg"))[1] is None
    assert fetcher.fetch_image(web.url("ok/8.jpg"))[1] is None
    message = fetcher.fetch_image(web.url("private/ok/7.jpg"))[1]
    assert outcome_of("failed", message) is Outcome.ROBOTS_TXT
    assert (web.hits["/robots.txt"], web.hits["/private/ok/7.jpg"]) == (1, 0)


def test_sites_are_told_who_asks(web) -> None:
    fetch(web.url("ok/7.jpg"), with_(contact="https://example.org/crawler"))
    assert "Mozilla/5.0 (compatible; evaclip; +https://example.org/crawler)" in web.agents


def test_no_more_connections_to_a_host_than_allowed_and_none_is_lost(web) -> None:
    fetcher = Fetcher(with_(host_connections=2, deadline_s=0.8))
    results: list[str | None] = []

    def ask(number: int) -> None:
        results.append(fetcher.fetch_image(web.url(f"crowd/{number}.jpg"))[1])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [None] * 30  # waiting for others is not counted against the deadline
    assert web.crowd_at_most == 2


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
