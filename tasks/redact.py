"""Secrets that went astray into text (addresses with a password, links with a token), blanked out
before it is logged, shown or put into error messages."""

import re
from typing import Any

HIDDEN = "***"
_PASSWORD = re.compile(r"(?<=://)(?:([^\s/@:\"']*:)[^\s/\"]+|[^\s/@:\"']{16,})(?=@)")
"""Of an address, or a long token in its place."""
_NAMES = (
    r"(?:token|secret|password|passwd|signature|sig|credential|cookie|api[-_]?key|access[-_]?key"
    r"|account[-_]?key|auth[-_]?string)"
)
_NAMED = re.compile(
    rf"(?i)({_NAMES}(?:\s?=\s?[\"']?|[\"']?:\s*[\"']|:\s*(?=\S*\d))|--{_NAMES} )"
    r"(?:(?<=\")[^\"\n]+|(?<=')[^'\n]+|[^\s&#;\"']+)"
)
"""A value behind its name; behind a colon without quotes one that has a digit, as prose seldom."""
_NAME = re.compile(rf"(?i)(?:^|[-_. ]){_NAMES}$")
"""Of a setting."""
_HEADER = re.compile(r"(?i)(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:\w+ )?)[^\s\"',]+")
_SCHEME = re.compile(r"\b((?i:bearer|basic)) (?=\S*[\dA-Z+/=_])[\w.~+/=-]{12,}")
"""Of an Authorization header."""
_KNOWN = re.compile(
    r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|(?:hf|api_org|npm|pnu|pnb)_\w{20,}|gh[opsur]_\w{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[a-z](?:\.xox[a-z])?-[\w-]{10,}|xapp-[\w-]{10,}"
    r"|(?<=hooks\.slack\.com/services/)[\w/]+|sk-[\w-]{20,}|[rs]k_(?:live|test)_\w{16,}"
    r"|AIza[\w-]{30,}|ya29\.[\w-]{10,}|GOCSPX-[\w-]{20,}|dop_v1_\w{20,}|pypi-[\w-]{16,}"
    r"|SG\.[\w-]{16,}\.[\w-]{16,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
)
"""Keys and tokens that say by their first letters whose they are."""
_PRIVATE_KEY = re.compile(
    r"-----BEGIN ([A-Z ]*PRIVATE KEY(?: BLOCK)?)-----.*?(?:-----END \1-----|\Z)", re.DOTALL
)


def redact_text(text: str) -> str:
    """`text` with every password of an address, every secret of a query or a header, and every
    key and token of a known form as `***`."""
    text = _PASSWORD.sub(rf"\g<1>{HIDDEN}", _PRIVATE_KEY.sub(HIDDEN, text))
    text = _HEADER.sub(rf"\1{HIDDEN}", _NAMED.sub(rf"\1{HIDDEN}", text))
    return _KNOWN.sub(HIDDEN, _SCHEME.sub(rf"\1 {HIDDEN}", text))


def redact_settings(value: Any) -> Any:
    """A copy of nested settings with `redact_text` over every text in them; a text that is called
    a password, a token or the like is hidden whole."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {
            key: HIDDEN
            if one and isinstance(one, str) and _NAME.search(str(key))
            else redact_settings(one)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_settings(one) for one in value]
    return value
