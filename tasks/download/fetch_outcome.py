"""The outcome of a URL: img2dataset's free text as one of a few words, and how long a server asked
to wait."""

import re
from collections.abc import Mapping
from enum import StrEnum


class Outcome(StrEnum):
    """One word a row; every row has exactly one."""

    SUCCESS = "success"
    NOT_FOUND = "not_found"
    FORBIDDEN = "forbidden"
    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"
    HTTP_OTHER = "http_other"
    REDIRECT_LOOP = "redirect_loop"
    TIMEOUT = "timeout"
    DEADLINE = "deadline"
    DNS = "dns"
    CONNECTION = "connection"
    TLS = "tls"
    INCOMPLETE = "incomplete"
    BAD_URL = "bad_url"
    ADDRESS_REFUSED = "address_refused"
    TOO_MANY_BYTES = "too_many_bytes"
    NOT_AN_IMAGE_TYPE = "not_an_image_type"
    OPTED_OUT = "opted_out"
    ROBOTS_TXT = "robots_txt"
    HASH_MISMATCH = "hash_mismatch"
    UNDECODABLE = "undecodable"
    DAMAGED = "damaged"
    TOO_COSTLY = "too_costly"
    TOO_SMALL = "too_small"
    TOO_MANY_PIXELS = "too_many_pixels"
    ASPECT_RATIO = "aspect_ratio"
    OTHER = "other"


NETWORK = frozenset({Outcome.DNS, Outcome.CONNECTION, Outcome.TIMEOUT})
"""What nearly every URL ends in when our own network or name service is down."""
RETRYABLE = NETWORK | {Outcome.RATE_LIMITED, Outcome.SERVER_ERROR, Outcome.INCOMPLETE}
REFUSALS: Mapping[Outcome, str] = {
    Outcome.ADDRESS_REFUSED: "refused: the address is not public",
    Outcome.BAD_URL: "refused: the address holds credentials",
    Outcome.TOO_MANY_BYTES: "refused: more bytes than max_bytes",
    Outcome.NOT_AN_IMAGE_TYPE: "refused: the content type is no image",
    Outcome.DEADLINE: "refused: longer than deadline_s",
    Outcome.OPTED_OUT: "refused: the site declines such use (its headers, or ai.txt)",
    Outcome.ROBOTS_TXT: "refused: disallowed by robots.txt",
    Outcome.HASH_MISMATCH: "refused: hash mismatch",
    Outcome.RATE_LIMITED: "refused: the host asked to be left alone for now",
    Outcome.DAMAGED: "refused: damaged content",
    Outcome.TOO_COSTLY: "refused: costs too much to decode",
    Outcome.TOO_MANY_PIXELS: "refused: more pixels than max_pixels",
    Outcome.TOO_SMALL: "refused: smaller than min_image_px",
    Outcome.ASPECT_RATIO: "refused: longer than max_aspect_ratio",
    Outcome.UNDECODABLE: "refused: cannot be decoded",
}
"""Our own reasons, in the words in which `outcome_of` finds them again."""

_OF_HTTP_STATUS = {
    **dict.fromkeys((401, 403, 451), Outcome.FORBIDDEN),
    **dict.fromkeys((404, 410), Outcome.NOT_FOUND),
    429: Outcome.RATE_LIMITED,
}
# Patterns are searched in order; the first that is found decides.
_OF_TEXT = tuple(
    (re.compile(pattern, re.IGNORECASE), outcome)
    for pattern, outcome in (
        *((re.escape(text), outcome) for outcome, text in REFUSALS.items()),
        (r"unknown url type|control characters|codec can't encode|no host given", Outcome.BAD_URL),
        (r"nonnumeric port|invalid ipv6|label (empty|too long)|invalid url", Outcome.BAD_URL),
        (r"incompleteread", Outcome.INCOMPLETE),
        (r"certificate|\bssl\b|tls", Outcome.TLS),
        (r"name or service|name resolution|nodename|no address associated", Outcome.DNS),
        (r"timed out", Outcome.TIMEOUT),
        (r"errno|remote end closed|connection", Outcome.CONNECTION),
        (r"image too small", Outcome.TOO_SMALL),
        (r"image area too large|max_image_pixels|pixels <= CV_IO", Outcome.TOO_MANY_PIXELS),
        (r"aspect ratio", Outcome.ASPECT_RATIO),
        (r"decoding error|opencv|imdecode", Outcome.UNDECODABLE),
    )
)
_HTTP_ERROR = re.compile(r"HTTP Error (\d{3})")
_RETRY_AFTER = re.compile(r"\(retry after (\d+(?:\.\d+)?(?:e\+\d+)?) s\)$")
BUSY_STATUSES = frozenset({429, 503})
"""HTTP answers with which a host asks for fewer requests."""


def with_retry_after(message: str, seconds: float | None) -> str:
    """`message` with what the server's Retry-After asked for; `retry_after_s` reads it back."""
    return message if seconds is None else f"{message} (retry after {seconds:g} s)"


def retry_after_s(message: str | None) -> float:
    """Seconds for which the server asked to wait; 0 if it did not."""
    found = _RETRY_AFTER.search(message or "")
    return float(found.group(1)) if found else 0.0


def outcome_of(status: str, message: str | None) -> Outcome:
    """The word for a row's `status` and `error_message` as img2dataset writes them."""
    if status == "success":
        return Outcome.SUCCESS
    text = message or ""
    if http_error := _HTTP_ERROR.search(text):
        code = int(http_error.group(1))
        if code >= 500:
            return Outcome.SERVER_ERROR
        # urllib follows redirects, so one that is left over led in circles or to another scheme
        by_class = Outcome.REDIRECT_LOOP if 300 <= code < 400 else Outcome.HTTP_OTHER
        return _OF_HTTP_STATUS.get(code, by_class)
    found = (outcome for pattern, outcome in _OF_TEXT if pattern.search(text))
    return next(found, Outcome.OTHER)
