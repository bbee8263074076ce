"""Opt-outs: headers of an answer that decline the use of its image.

Covers: X-Robots-Tag with its scopes, and the header of the TDM Reservation Protocol.
Not here: robots.txt (robots.py), fetching.

X-Robots-Tag: https://developers.google.com/search/docs/crawling-indexing/robots-meta-tag
TDMRep: https://www.w3.org/community/reports/tdmrep/CG-FINAL-tdmrep-20240510/
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from email.message import Message

_WITH_A_VALUE = frozenset(
    {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"}
)
"""Directives written `name: value`; every other name before a colon is a crawler's."""


def declines_use(headers: Message, *, token: str, directives: Iterable[str], tdm: bool) -> bool:
    """Whether an image that came with `headers` may not be used.

    Args:
        token: our name; directives addressed to others do not concern us.
        directives: X-Robots-Tag values that decline.
        tdm: whether `tdm-reservation: 1` declines, too.
    """
    unwanted = {directive.strip().lower() for directive in directives}
    values = headers.get_all("X-Robots-Tag", [])
    if any(_for_us(str(value), token.lower()) & unwanted for value in values):
        return True
    return tdm and str(headers.get("tdm-reservation", "")).strip() == "1"


def _for_us(value: str, token: str) -> Set[str]:
    """Directives of one header line that are for everyone or for us; a name holds to its end."""
    addressee, found = "", set()
    for part in value.lower().split(","):
        name, colon, rest = (piece.strip() for piece in part.partition(":"))
        if colon and name not in _WITH_A_VALUE:
            addressee, name = name, rest
        if addressee in ("", "*", token):
            found.add(name)
    return found
