"""Fetching over real HTTP on loopback: what works, and all that is refused."""

from __future__ import annotations

import io
import socket
import time
import urllib.request

import pytest

from tasks.download.fetch import Deadline, Limits, fetch_with_retries, guarded_opener
from tasks.download.outcome import Outcome, outcome_of

LIMITS = Limits(
    allowed_networks=("127.0.0.1/32",),
    max_bytes=100_000,
    deadline_s=0.8,
    retries=0,
    retry_wait_s=0.01,
)


def fetch(
    url: str, limits: Limits = LIMITS, timeout_s: float = 0.4
) -> tuple[bytes | None, Outcome]:
    deadline = Deadline()
    opener = guarded_opener(limits, deadline)

    def attempt() -> tuple[io.BytesIO | None, str | None]:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "test"})
            with opener.open(request, timeout=timeout_s) as response:
                return io.BytesIO(response.read()), None
        except Exception as error:
            return None, str(error)

    body, message = fetch_with_retries(attempt, limits, deadline)
    word = outcome_of("success" if message is None else "failed", message)
    return body.getvalue() if body else None, word


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
        ("html", Outcome.NOT_AN_IMAGE_TYPE),
        ("svg", Outcome.NOT_AN_IMAGE_TYPE),
        ("short", Outcome.INCOMPLETE),
        ("huge", Outcome.TOO_MANY_BYTES),
        ("unsized", Outcome.TOO_MANY_BYTES),
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
    assert time.monotonic() - began < LIMITS.deadline_s + 0.5


@pytest.mark.parametrize("host", ["127.0.0.2", "[::1]", "2130706434"])
def test_a_redirect_cannot_leave_the_allowed_network(web, host: str) -> None:
    url = web.url(f"redirect/http://{host}:{web.port}/ok/7.jpg")
    assert fetch(url) == (None, Outcome.ADDRESS_REFUSED)


def test_nothing_is_allowed_on_loopback_unless_it_is_said(web) -> None:
    limits = Limits((), 100_000, 1.0, 0, 0.0)
    assert fetch(web.url("ok/7.jpg"), limits) == (None, Outcome.ADDRESS_REFUSED)


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "data:image/png;base64,AA", "ftp://127.0.0.1/x"]
)
def test_only_http_and_https_are_opened(url: str) -> None:
    assert fetch(url) == (None, Outcome.BAD_URL)


def test_a_redirect_to_ftp_or_a_file_is_not_followed(web) -> None:
    for target in ("ftp://127.0.0.1/x", "file:///etc/hostname"):
        assert fetch(web.url(f"redirect/{target}"))[0] is None


def test_a_proxy_of_the_environment_is_ignored(web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetch(web.url("ok/7.jpg"))[1] is Outcome.SUCCESS


def test_a_failure_that_may_pass_is_tried_again_and_others_are_not(web) -> None:
    limits = Limits(("127.0.0.1/32",), 100_000, 2.0, 2, 0.01)
    assert fetch(web.url("flaky/one"), limits)[1] is Outcome.SUCCESS
    assert web.hits["/flaky/one"] == 2
    assert fetch(web.url("gone/one"), limits)[1] is Outcome.NOT_FOUND
    assert web.hits["/gone/one"] == 1


def test_retries_end_with_the_deadline(web) -> None:
    limits = Limits(("127.0.0.1/32",), 100_000, 0.7, 10, 0.2)
    began = time.monotonic()
    assert fetch(f"http://127.0.0.1:{closed_port()}/", limits)[1] is Outcome.CONNECTION
    assert time.monotonic() - began < 1.0


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
