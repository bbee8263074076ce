"""Headers that decline, and those that do not concern us."""

from __future__ import annotations

from email.message import Message

import pytest

from tasks.download.politeness import declines_use

DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex", "noml")


def message(*headers: tuple[str, str]) -> Message:
    result = Message()
    for name, value in headers:
        result[name] = value
    return result


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("noai", True),
        ("NOML", True),
        ("all, noimageai", True),
        ("evaclip: noai", True),
        ("EvaClip: nofollow, noml", True),
        ("*: noindex", True),
        ("otherbot: noai", False),
        ("otherbot: nofollow, noai", False),
        ("otherbot: noai, evaclip: noai", True),
        ("max-image-preview: none", False),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST, noai", True),
        ("noainess", False),
        ("none", True),
        ("otherbot: none", False),
        ("evaclip/1.0: noai", True),
        ("unavailable_after: Sunday, 25-Jun-10 15:00:00 PST, noai", True),
        ("", False),
        (":,:", False),
    ],
)
def test_x_robots_tag(value: str, expected: bool) -> None:
    headers = message(("X-Robots-Tag", value))
    assert declines_use(headers, token="evaclip", directives=DIRECTIVES, tdm=True) is expected


def test_every_line_of_a_repeated_header_counts() -> None:
    headers = message(("X-Robots-Tag", "otherbot: noindex"), ("x-robots-tag", "noml"))
    assert declines_use(headers, token="evaclip", directives=DIRECTIVES, tdm=True)
    assert not declines_use(headers, token="evaclip", directives=("noai",), tdm=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("train-ai=n", True), ("search=y, train-ai=n;x", True), ("train-ai=y", False), ("", False)],
)
def test_ietfs_preference_is_obeyed_if_wanted(value: str, expected: bool) -> None:
    headers = message(("Content-Usage", value))
    assert declines_use(headers, token="evaclip", directives=(), tdm=True) is expected
    assert not declines_use(headers, token="evaclip", directives=(), tdm=False)


@pytest.mark.parametrize(("value", "expected"), [("1", True), (" 1 ", True), ("0", False)])
def test_the_tdm_reservation_is_obeyed_if_wanted(value: str, expected: bool) -> None:
    headers = message(("TDM-Reservation", value))
    assert declines_use(headers, token="evaclip", directives=(), tdm=True) is expected
    assert not declines_use(headers, token="evaclip", directives=(), tdm=False)
