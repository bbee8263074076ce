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
    r"(?i)((?:token|secret|password|passwd|signature|sig|credential|api-?key|access-?key)=)"
    r"[^\s&#\"']+"
)


def redact_text(text: str) -> str:
    """`text` with every password of an address and every secret of a query as `***`.

    `https://me:pw@host/x?X-Amz-Signature=ab` becomes `https://me:***@host/x?X-Amz-Signature=***`.
    """
    return _TOKEN.sub(rf"\1{HIDDEN}", _PASSWORD.sub(rf"\1:{HIDDEN}", text))


def redact_settings(value: Any) -> Any:
    """A copy of nested settings with `redact` over every text in them."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {key: redact_settings(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [redact_settings(one) for one in value]
    return value
