"""URLs as a merge writes them, for whoever looks one up.

Covers: the normal form of single URLs. Not here: rows of metadata; see merge.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.merge.database import load_statement, open_database


def normal_urls(urls: Sequence[str]) -> list[str | None]:
    """Each URL ready to fetch, as a selected row has it; None when no web server can be asked."""
    query = (
        "WITH published AS (SELECT raw_url, place, NULL::VARCHAR AS raw_caption "
        "FROM (SELECT unnest($urls::VARCHAR[]) AS raw_url, unnest(range(len($urls))) AS place)), "
        + load_statement("normalise")
        + " SELECT url FROM normalised ORDER BY place"
    )
    with TemporaryDirectory() as spill, open_database(Path(spill), "1GB", 1) as connection:
        rows = connection.execute(query, {"urls": list(urls)}).fetchall()
    return [url for (url,) in rows]
