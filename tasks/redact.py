"""Secrets that stand inside text: addresses with a password, links with a token.

Covers: blanking them out, so that settings can be logged, shown and put into error messages.
Not here: where secrets belong, which is the environment or a secret store; this is for those that
went astray.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_PASSWORD = re.compile(r"(?<=://)([^\s/@:\"']*):([^\s/@\"']+)(?=@)")
_TOKEN = re.compile(
    r"(?i)((?:token|secret|password|passwd|signature|sig|credential|api[-_]?key|access[-_]?key"
    r"|account[-_]?key)(?:=|[\"']?:\s*[\"']))"
    r"[^\s&#;\"']+"
)
_SCHEME = re.compile(r"(?i)\b(bearer|basic) [\w.~+/=-]{12,}")
"""Of an Authorization header."""
_KNOWN = re.compile(
    r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|hf_\w{20,}|gh[opsu]_\w{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[abpr]-[\w-]{10,}|sk-[\w-]{20,}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
)
"""Keys and tokens that say by their first letters whose they are."""
_PRIVATE_KEY = re.compile(
    r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?(?:-----END \1-----|\Z)", re.DOTALL
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that move a terminal's cursor or turn the direction of text; not tab and line feed."""


def redact_text(text: str) -> str:
    """`text` with every password of an address, every secret of a query or a header, and every
    key and token of a known form as `***`.

    `https://me:pw@host/x?X-Amz-Signature=ab` becomes `https://me:***@host/x?X-Amz-Signature=***`.
    """
    text = _TOKEN.sub(rf"\1{HIDDEN}", _PASSWORD.sub(rf"\1:{HIDDEN}", text))
    text = _SCHEME.sub(rf"\1 {HIDDEN}", _PRIVATE_KEY.sub(HIDDEN, text))
    return _KNOWN.sub(HIDDEN, text)


def escape_control(text: str) -> str:
    """`text` with every control character as it is written in Python: a name or caption of others
    must not move the cursor, recolour the terminal or turn text round."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def redact_settings(value: Any) -> Any:
    """A copy of nested settings with `redact` over every text in them."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {key: redact_settings(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [redact_settings(one) for one in value]
    return value
