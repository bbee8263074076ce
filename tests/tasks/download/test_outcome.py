"""From img2dataset's words to ours."""

from __future__ import annotations

import pytest

from tasks.download.fetch_outcome import REFUSALS, RETRYABLE, Outcome, outcome_of

DOWNLOAD_MESSAGES = {
    "HTTP Error 404: Not Found": Outcome.NOT_FOUND,
    "HTTP Error 410: Gone, connection closed": Outcome.NOT_FOUND,
    "HTTP Error 403: Forbidden": Outcome.FORBIDDEN,
    "HTTP Error 429: Too Many Requests": Outcome.RATE_LIMITED,
    "HTTP Error 500: Internal Server Error": Outcome.SERVER_ERROR,
    "HTTP Error 504: Gateway timed out": Outcome.SERVER_ERROR,
    "HTTP Error 418: I'm a teapot": Outcome.HTTP_OTHER,
    "HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite "
    "loop.": Outcome.REDIRECT_LOOP,
    "timed out": Outcome.TIMEOUT,
    "<urlopen error timed out>": Outcome.TIMEOUT,
    "The read operation timed out": Outcome.TIMEOUT,
    "<urlopen error _ssl.c:989: The handshake operation timed out>": Outcome.TIMEOUT,
    "<urlopen error [Errno -2] Name or service not known>": Outcome.DNS,
    "<urlopen error [Errno -3] Temporary failure in name resolution>": Outcome.DNS,
    "<urlopen error [Errno 111] Connection refused>": Outcome.CONNECTION,
    "[Errno 104] Connection reset by peer": Outcome.CONNECTION,
    "Remote end closed connection without response": Outcome.CONNECTION,
    "<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>": Outcome.TLS,
    "IncompleteRead(0 bytes read, 4000 more expected)": Outcome.INCOMPLETE,
    "unknown url type: 'None'": Outcome.BAD_URL,
    "<urlopen error unknown url type: file>": Outcome.BAD_URL,
    "URL can't contain control characters. '/a b' (found at least ' ')": Outcome.BAD_URL,
    "'ascii' codec can't encode character '\\xfc' in position 5": Outcome.BAD_URL,
    REFUSALS[Outcome.OPTED_OUT]: Outcome.OPTED_OUT,
    REFUSALS[Outcome.ROBOTS_TXT]: Outcome.ROBOTS_TXT,
    REFUSALS[Outcome.HASH_MISMATCH]: Outcome.HASH_MISMATCH,
    REFUSALS[Outcome.RATE_LIMITED]: Outcome.RATE_LIMITED,
    "HTTP Error 503: Service Unavailable (retry after 120 s)": Outcome.SERVER_ERROR,
    REFUSALS[Outcome.ADDRESS_REFUSED]: Outcome.ADDRESS_REFUSED,
    f"<urlopen error {REFUSALS[Outcome.TOO_MANY_BYTES]}>": Outcome.TOO_MANY_BYTES,
    REFUSALS[Outcome.NOT_AN_IMAGE_TYPE]: Outcome.NOT_AN_IMAGE_TYPE,
    REFUSALS[Outcome.DEADLINE]: Outcome.DEADLINE,
    "no idea": Outcome.OTHER,
}
RESIZE_MESSAGES = {
    "Image decoding error": Outcome.UNDECODABLE,
    "OpenCV(4.14.0) error: (-215:Assertion failed) !buf.empty()": Outcome.UNDECODABLE,
    "image too small": Outcome.TOO_SMALL,
    "image area too large": Outcome.TOO_MANY_PIXELS,
    "aspect ratio too large": Outcome.ASPECT_RATIO,
}


@pytest.mark.parametrize(("message", "expected"), DOWNLOAD_MESSAGES.items())
def test_download_failures_have_one_word(message: str, expected: Outcome) -> None:
    assert outcome_of("failed_to_download", message) is expected


@pytest.mark.parametrize(("message", "expected"), RESIZE_MESSAGES.items())
def test_image_failures_have_one_word(message: str, expected: Outcome) -> None:
    assert outcome_of("failed_to_resize", message) is expected


def test_what_will_not_pass_is_not_tried_again() -> None:
    assert outcome_of("success", None) is Outcome.SUCCESS
    for final in (Outcome.NOT_FOUND, Outcome.DEADLINE, Outcome.ADDRESS_REFUSED, Outcome.TLS):
        assert final not in RETRYABLE
