"""The rules a row must pass, as SQL expressions.

Covers: every reason for which a row is dropped, in the order in which the rules are asked, and the
SQL expression that gives a row's reason under a `FilterConfig`.
Not here: the columns they are asked about (schema.py, sql/normalise.sql); duplicates (dedupe.sql).

An expression is true when the row fails. Rules that are off are left out of the statement.
"""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any, NamedTuple

from tasks.merge.config import FilterConfig

KNOWN_TAGS = ("UNLIKELY", "UNSURE", "NSFW")
LABELS_OF_A_DOMAIN = 6
"""A blocked name with more labels than this blocks that very host only."""

HOST = r"regexp_extract(address, '^(?:\[[^\]]*\]|[^/:]*)')"
HOST_AND_ABOVE = (
    HOST,
    *(
        f"array_to_string(list_slice(string_split({HOST}, '.'), -{labels}, -1), '.')"
        for labels in range(1, LABELS_OF_A_DOMAIN + 1)
    ),
)
HASHES = ("md5(url)", "md5(raw_url)", "sha256(url)", "sha256(raw_url)", "lower(image_hash)")


class Rule(NamedTuple):
    """One reason to drop a row."""

    reason: str
    fails: str
    """SQL over the columns of `normalised`; `$name` is a field of `FilterConfig`."""
    needs: tuple[str, ...] = ()
    """Fields of `FilterConfig` without which the rule is off: unset, empty, or "keep"."""

    def is_on(self, filters: FilterConfig, off: tuple[object, ...] = (None, (), "keep")) -> bool:
        return all(attrgetter(name)(filters) not in off for name in self.needs)


def _list_values(values: Iterable[str], table: str) -> str:
    return " OR ".join(f"{value} IN (SELECT entry FROM {table})" for value in values)


RULES = (
    Rule("not_utf8", "broken_text AND (raw_url IS NULL OR raw_caption IS NULL)"),
    Rule("missing_url", "coalesce(clean_url, '') = ''"),
    Rule("unsupported_url", "url IS NULL"),
    Rule("blocked_url", _list_values(["address"], "blocked_addresses"), ("blocklists.urls",)),
    Rule(
        *("blocked_domain", _list_values(HOST_AND_ABOVE, "blocked_domains")),
        needs=("blocklists.domains",),
    ),
    Rule("blocked_hash", _list_values(HASHES, "blocked_hashes"), ("blocklists.hashes",)),
    Rule("missing_caption", "coalesce(caption, '') = ''"),
    Rule("short_caption", "length(caption) < $min_caption_chars"),
    Rule("long_caption", "length(caption) > $max_caption_chars", ("max_caption_chars",)),
    Rule("language", "NOT list_contains($languages::VARCHAR[], language)", ("languages",)),
    Rule(
        *("unknown_language", "has_language AND language IS NULL"),
        needs=("languages", "unknown_language"),
    ),
    Rule("small_image", "least(width, height) < $min_side", ("min_side",)),
    Rule(
        *("extreme_aspect", "greatest(width, height) > $max_aspect::DOUBLE * least(width, height)"),
        needs=("max_aspect",),
    ),
    Rule("low_similarity", "similarity < $min_similarity::DOUBLE", ("min_similarity",)),
    Rule(
        *("unknown_similarity", "has_similarity AND similarity IS NULL"),
        needs=("min_similarity", "unknown_similarity"),
    ),
    Rule("unsafe", "unsafe_score > $max_unsafe::DOUBLE", ("max_unsafe",)),
    Rule("unsafe", "unsafe_tag", ("unsafe_tags",)),
    Rule("unknown_unsafe", "lacks_score", ("unknown_unsafe", "max_unsafe")),
    Rule("unknown_unsafe", "unknown_tag", ("unknown_unsafe", "unsafe_tags")),
    Rule("watermark", "watermark > $max_watermark::DOUBLE", ("max_watermark",)),
    Rule(
        *("unknown_watermark", "has_watermark AND watermark IS NULL"),
        needs=("max_watermark", "unknown_watermark"),
    ),
)

UNREADABLE_LINE = "unreadable_line"
"""A line of a text file that is not a row."""
REASONS = (
    UNREADABLE_LINE,
    *dict.fromkeys(rule.reason for rule in RULES),
    "withdrawn",
    "duplicate_in_source",
    "duplicate_across_sources",
    "given_before",
    "not_selected",
)
"""Why a row is dropped: the first, in this order, that applies to it."""


def reason_expression(filters: FilterConfig) -> str:
    """SQL that gives the first rule a row fails, NULL for a row that passes."""
    cases = "\n      ".join(
        f"WHEN {rule.fails} THEN '{rule.reason}'" for rule in RULES if rule.is_on(filters)
    )
    return f"CASE {cases} END"


def listed_expression() -> str:
    """SQL of the entries of blocklists that a blocked row may match; none of any other."""
    entries = ", ".join(("address", *HOST_AND_ABOVE, *HASHES))
    return f"CASE WHEN starts_with(reason, 'blocked_') THEN [{entries}] END"


def unjudged_expression(filters: FilterConfig) -> str:
    """SQL of the `unknown_...` rules that a row which passes would fail, were it not for "keep"."""
    off = (None, (), "drop")
    kept = (rule for rule in RULES if len(rule.needs) > 1 and rule.is_on(filters, off))
    found = ", ".join(f"CASE WHEN {rule.fails} THEN '{rule.reason}' END" for rule in kept)
    return f"CASE WHEN reason IS NULL THEN [{found or 'NULL::VARCHAR'}] END"


def rule_parameters(filters: FilterConfig) -> dict[str, Any]:
    """Values of the parameters that `RULES` name."""
    return {
        **filters.model_dump(exclude={"blocklists", "languages", "unsafe_tags"}),
        "languages": list(filters.languages),
        "unsafe_tags": list(filters.unsafe_tags),
        "known_tags": [*KNOWN_TAGS, *filters.unsafe_tags],
    }
