"""The meaning of the columns of a metadata file: published layouts (layouts.json) told apart,
withdrawn ones refused, a column map checked against a file, the SQL select list that gives every
layout the same columns, and a copy of a file without texts that are not UTF-8."""

import difflib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from evaclip_model.errors import InputError
from evaclip_model.reading.urls import open_binary
from tasks.merge.config import CLEANED, ColumnMap, SourceConfig

PublishedColumns = Mapping[str, str]
"""Column name -> DuckDB type, as found in a file."""

LAYOUTS: Mapping[str, Mapping[str, Sequence[str]]] = json.loads(
    Path(__file__).with_name("layouts.json").read_text()
)
"""Published layout -> part -> names of the columns that may play it, the best first."""
OLD_COLUMNS = {"URL", "TEXT"}
"""Every edition of before the withdrawal has them; Re-LAION has `url` and `caption`."""
ONLY_IN_COYO = {"image_phash", "clip_similarity_vitb32", "nsfw_score_opennsfw2"}
INTEGERS = {
    f"{sign}{kind}" for sign in ("", "U") for kind in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT")
}
NUMBERS = INTEGERS | {"HUGEINT", "FLOAT", "DOUBLE"}
TEXT = "VARCHAR"
NOT_BROKEN = "false"
BROKEN_TEXT = "__broken_text"
TEXTS = ("url", "caption", "language", "image_hash")
"""Parts that only text can play."""
EITHER = ("id", "unsafe")
JUDGED = ("language", "similarity", "watermark")
ROWS_AT_ONCE = 50_000


def column_map(
    source: SourceConfig, published: PublishedColumns, file: str, is_text: bool = False
) -> ColumnMap:
    """The column map of one file: the source's own, or the published layout's.

    In a file of text every column can play every part; what is not a number then is unknown.
    A column that is missing or of a type that cannot play its part, and an old copy of a withdrawn
    collection with nothing to compare it with, are `InputError`s.
    """
    if is_old_edition(published) and not (source.diff_against or source.own_rows):
        raise InputError(
            f"{file}: source '{source.name}' has the columns of LAION's metadata of before "
            "December 2023, withdrawn because it held links to suspected child sexual abuse "
            f"material: use {CLEANED}, or set diff_against to its files to keep only what it "
            "still has (own_rows = true if the rows are not LAION's)"
        )
    chosen = source.columns
    if not isinstance(chosen, ColumnMap):
        is_coyo = chosen == "coyo" or (chosen == "auto" and not ONLY_IN_COYO.isdisjoint(published))
        chosen = _from_layout(LAYOUTS["coyo" if is_coyo else "laion"], published)
    for part, name in column_parts(chosen):
        where, kind = f"{file}: source '{source.name}'", published.get(name)
        if kind is None:
            lowered = {known.lower(): known for known in published}
            hint = f"its columns are {', '.join(published) or 'none'}"
            for near in difflib.get_close_matches(name.lower(), lowered, n=1):
                hint = f"did you mean '{lowered[near]}'?"
            raise InputError(f"{where} has no column '{name}' for its {part}; {hint}")
        fits = (kind == TEXT and part in TEXTS + EITHER) or (is_number(kind) and part not in TEXTS)
        if not is_text and not fits:
            expected = "text" if part in TEXTS else "a number" + " or text" * (part in EITHER)
            raise InputError(
                f"{where}: column '{name}' is {kind}, "
                f"but its {part} must be {expected}: name another column"
            )
    return chosen


def is_old_edition(columns: Collection[str]) -> bool:
    return set(columns) >= OLD_COLUMNS


class JudgedParts(NamedTuple):
    """The columns that rules can judge a source by: what any of its files has."""

    parts: frozenset[str]
    """Of `JUDGED`."""
    scores: frozenset[str]
    """Safety columns that hold numbers."""
    tags: frozenset[str]
    """Safety columns that hold LAION's tags."""

    @classmethod
    def of(cls, maps: Sequence[tuple[ColumnMap, PublishedColumns]]) -> Self:
        unsafe = {name: kinds[name] for columns, kinds in maps for name in columns.unsafe}
        return cls(
            frozenset(p for p in JUDGED if any(getattr(columns, p) for columns, _ in maps)),
            frozenset(name for name, kind in unsafe.items() if kind != TEXT),
            frozenset(name for name, kind in unsafe.items() if kind == TEXT),
        )


def select_list(columns: ColumnMap, published: PublishedColumns, judged: JudgedParts) -> str:
    """Select list with the same names and types for every layout; what is not valid is none.

    unsafe_score: the largest; lacks_score: a safety score is missing; unsafe_tag, unknown_tag: a
    safety tag is in `$unsafe_tags`, or not in `$known_tags`; has_*: whether there is such a column,
    here or in another file of the source (`judged`): what a file lacks is unknown of all its rows;
    broken_text: a text is not UTF-8 and therefore none, which only a repaired file tells.
    """
    unsafe = {name: published[name] == TEXT for name in columns.unsafe}
    tags = [
        f"coalesce(upper(trim({quote_identifier(name)})), '')" for name in unsafe if unsafe[name]
    ]
    scores = [_number_column(name) for name in unsafe if not unsafe[name]]
    lacks_score = [f"{score} IS NULL" for score in scores]
    lacks_score += ["true" for _ in judged.scores - unsafe.keys()]
    not_known = [f"NOT list_contains($known_tags::VARCHAR[], {tag})" for tag in tags]
    not_known += ["true" for _ in judged.tags - unsafe.keys()]
    items = {
        "raw_url": quote_identifier(columns.url),
        "raw_caption": quote_identifier(columns.caption),
        "original_id": f"{quote_identifier(columns.id) if columns.id else 'NULL'}::VARCHAR",
        "width": _number_column(columns.width, "BIGINT", "{} > 0"),
        "height": _number_column(columns.height, "BIGINT", "{} > 0"),
        "similarity": _number_column(columns.similarity, valid="{} BETWEEN -1 AND 1"),
        "watermark": _number_column(columns.watermark),
        "unsafe_score": f"greatest({', '.join(scores)})" if scores else "NULL::DOUBLE",
        "lacks_score": _join_with_or(lacks_score),
        "unsafe_tag": _join_with_or(
            f"list_contains($unsafe_tags::VARCHAR[], {tag})" for tag in tags
        ),
        "unknown_tag": _join_with_or(not_known),
        "language": _text_column(columns.language),
        "image_hash": _text_column(columns.image_hash),
        **{f"has_{part}": str(part in judged.parts) for part in JUDGED},
        "broken_text": NOT_BROKEN,
    }
    return ",\n    ".join(f"{expression} AS {name}" for name, expression in items.items())


def is_number(kind: str) -> bool:
    return kind in NUMBERS or kind.startswith("DECIMAL")


def key_text(column: str, kind: str) -> str:
    """SQL of a key as text, the same for every type of number: 7, 7.0, '7' and '7.0' are one."""
    name = quote_identifier(column)
    if kind in INTEGERS or not is_number(kind):
        return f"regexp_replace({name}::VARCHAR, '^(-?[0-9]+)\\.0+$', '\\1')"
    whole = f"TRY_CAST({name} AS HUGEINT)"
    return f"CASE WHEN {whole} = {name} THEN {whole}::VARCHAR ELSE {name}::VARCHAR END"


def quote_identifier(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def _from_layout(layout: Mapping[str, Sequence[str]], published: PublishedColumns) -> ColumnMap:
    """The columns that a file has of a layout; of what it must have, the first name at least."""
    found = {part: [name for name in names if name in published] for part, names in layout.items()}
    for part in ("url", "caption"):
        found[part] = found[part] or [layout[part][0]]
    single = {part: names[0] for part, names in found.items() if names and part != "unsafe"}
    return ColumnMap(**single, unsafe=tuple(found["unsafe"]))


def column_parts(columns: ColumnMap) -> Iterator[tuple[str, str]]:
    """(part, name of a column that plays it) of every column of a map."""
    for part, value in columns.model_dump().items():
        for name in value if isinstance(value, tuple) else (value,):
            if name is not None:
                yield part, name


def _text_column(name: str | None) -> str:
    return "NULL::VARCHAR" if name is None else f"nullif(trim({quote_identifier(name)}), '')"


def _number_column(name: str | None, kind: str = "DOUBLE", valid: str = "isfinite({})") -> str:
    """SQL of a column's values that are `valid`; others are none."""
    if name is None:
        return f"NULL::{kind}"
    value = f"TRY_CAST({quote_identifier(name)} AS {kind})"
    return f"CASE WHEN {valid.format(value)} THEN {value} END"


def _join_with_or(conditions: Iterable[str]) -> str:
    return " OR ".join(f"({condition})" for condition in conditions) or "false"


def is_about_encoding(error: duckdb.Error) -> bool:
    """Return whether the database refuses a file for a text that is not UTF-8."""
    said = str(error).lower()
    return "invalid string encoding" in said or "invalid unicode" in said or "utf8" in said


def repair_text(path: str, target: Path) -> None:
    """Write the rows of a parquet file in their order; a text that is not UTF-8 is none, and its
    row is true in the column `BROKEN_TEXT`."""
    with open_binary(path) as raw:
        source = pq.ParquetFile(raw)
        fields = [*source.schema_arrow.remove_metadata(), pa.field(BROKEN_TEXT, pa.bool_())]
        schema = pa.schema(fields)
        with pq.ParquetWriter(target, schema, compression="zstd") as writer:
            for batch in source.iter_batches(ROWS_AT_ONCE):
                broken = [False] * batch.num_rows
                columns = [_repaired(column, broken) for column in batch.columns]
                writer.write_table(pa.table([*columns, pa.array(broken)], schema=schema))


def _repaired(column: pa.Array, broken: list[bool]) -> pa.Array:
    """A column of text without what is not UTF-8, whose rows are noted in `broken`."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column
    texts: list[str | None] = []
    for place, value in enumerate(column.cast(pa.large_binary()).to_pylist()):
        try:
            texts.append(None if value is None else value.decode())
        except UnicodeDecodeError:
            texts.append(None)
            broken[place] = True
    return pa.array(texts, column.type)
