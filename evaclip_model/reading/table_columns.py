"""Names of columns, separators and paths, as tables of images and captions have them."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

_NAMES = json.loads(Path(__file__).with_name("column_names.json").read_text())


def match_column(columns: Iterable[str], part: str) -> str:
    """The column with the first of the names of a part in column_names.json that one has, case and
    spaces aside, of labels names before numbers; "" where none has any."""
    plain = {one.strip().casefold().replace(" ", "_"): one for one in reversed([*columns])}
    return next((plain[name] for name in _NAMES[part] if name in plain), "")


def tell_delimiter(first_line: str) -> str:
    """The sign between the values of a .csv: a comma; without any the commonest of ; | tab."""
    return "," if "," in first_line else max(",;|\t", key=first_line.count)


def local_path(written: str) -> str:
    """The absolute path; one that Windows wrote, unless there is such a file."""
    path = os.path.abspath(written)
    return path if os.path.exists(path) else os.path.abspath(written.replace("\\", "/"))
