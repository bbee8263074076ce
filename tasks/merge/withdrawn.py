"""Published collections that are withdrawn, and the refusal of a recipe that names one.

Covers: their names on the hub, and telling their old copies from the column names.
Not here: the comparison with the cleaned edition; see merge.py.

In December 2023 suspected child sexual abuse material was found behind links of LAION-5B. LAION
took all its editions down; in August 2024 it published Re-LAION-5B without those links. There is
no public list of what was removed: an old copy is cleaned by keeping what Re-LAION still has.
"""

from __future__ import annotations

import re
from collections.abc import Collection

WITHDRAWN_NAMES = re.compile(r"(?i)\blaion/(laion-?(400m|[125]b)|laion-?(art|high-res|aesthetic))")
CLEANED = "laion/relaion2B-en-research-safe"
OLD_COLUMNS = {"URL", "TEXT"}
"""Every edition of before the withdrawal has them; Re-LAION has `url` and `caption`."""


def why_refused(files: str) -> str | None:
    """The reason why these files cannot be a source; None when they can.

    >>> why_refused("hf://datasets/laion/laion2B-en/*.parquet") is None
    False
    """
    if "://" not in files or not WITHDRAWN_NAMES.search(files):
        return None
    return (
        f"'{files}' was withdrawn in December 2023 because it held links to suspected child "
        f"sexual abuse material: use its cleaned edition, hf://datasets/{CLEANED}/*.parquet"
    )


def is_old_edition(columns: Collection[str]) -> bool:
    """Whether a file with these columns looks like LAION's metadata of before the withdrawal."""
    return set(columns) >= OLD_COLUMNS
