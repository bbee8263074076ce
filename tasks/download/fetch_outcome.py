"""The outcome of a URL: img2dataset's free text as one of a few words, and how long a server asked
to wait. Not here: the texts (outcomes.toml)."""

import re
import tomllib
from enum import StrEnum
from pathlib import Path


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
_TEXTS: dict[str, dict[str, str]] = tomllib.loads(
    Path(__file__).with_name("outcomes.toml").read_text()
)
REFUSALS = {Outcome(outcome): text for outcome, text in _TEXTS["refusals"].items()}
"""Our own reasons, in the words in which `outcome_of` finds them again."""
_OF_HTTP_STATUS = {int(code): Outcome(outcome) for code, outcome in _TEXTS["statuses"].items()}
_OF_TEXT = tuple(
    (re.compile(pattern, re.IGNORECASE), Outcome(outcome))
    for pattern, outcome in (
        *((re.escape(text), outcome) for outcome, text in REFUSALS.items()),
        *_TEXTS["messages"].items(),
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
