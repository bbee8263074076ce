"""The entries of a merge that balances, and the statement that finds them in captions (pairs.sql).

Not here: the units that match, count and draw (units.py), how rows are drawn (sql/balance.sql).
"""

import json

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.reading.urls import read_text
from tasks.merge.config import MOST_ENTRIES
from tasks.merge.database import load_statement

MARKS = "[,.;:?!`]"
MOST_CHARS = 300


def read_entries(path: str) -> list[str]:
    """Entries of a text file, one a line, or of JSON: a list, or an object with them as keys."""
    where = f"merge.balance.entries: {path}"
    try:
        text = read_text(path)
        found = json.loads(text) if path.endswith(".json") else text.split("\n")
        if not isinstance(found, list | dict):
            raise TypeError("it is not a list")
        "".join(map(str, found)).encode()  # JSON can say halves of characters
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{where} cannot be read ({shorten_error(error)}): name a text file (UTF-8) with one "
            "entry a line, or a .json with a list of texts"
        ) from error
    places: dict[str, int] = {}
    for place, entry in enumerate(found, 1):
        if not isinstance(entry, str) or len(entry) > MOST_CHARS:
            what = f"is not a text of at most {MOST_CHARS} characters"
            raise InputError(f"{where}, entry {place} {what}: take it out")
        text = entry.strip()
        if text and (first := places.setdefault(text, place)) != place:
            raise InputError(
                f"{where}, entry {place}, '{text}', is entry {first} again: take one out"
            )
    if not 0 < len(places) <= MOST_ENTRIES:
        raise InputError(f"{where} has {len(places):,} entries, not 1 to {MOST_ENTRIES:,}")
    return list(places)


def pairs_statement(most_words: int) -> str:
    """The statement pairs.sql for entries of at most so many words."""
    depths = range(1, most_words)
    runs = (load_statement("run", depth=str(n), before=str(n - 1)) for n in depths)
    found = (f"SELECT row, number FROM run_{n}" for n in range(most_words))
    words = "".join(f", unnest(words[{n + 1}:]) AS word_{n}" for n in depths)
    return load_statement("pairs", words=words, runs="".join(runs), found=" UNION ALL ".join(found))
