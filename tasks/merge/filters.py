"""The rules a row must pass (rules.json, in the order in which they are asked) as SQL that gives a
row's reason under a `FilterConfig`; rules that are off are left out of it.

Not here: the columns they are asked about (schema.py, sql/normalise.sql); duplicates (dedupe.sql).
"""

import json
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
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
    """SQL over the columns of `normalised`, true when the row fails; `$name` is a field of
    `FilterConfig`."""
    needs: tuple[str, ...] = ()
    """Fields of `FilterConfig` without which the rule is off: unset, empty, or "keep"."""

    def is_on(self, filters: FilterConfig, off: tuple[object, ...] = (None, (), "keep")) -> bool:
        return all(attrgetter(name)(filters) not in off for name in self.needs)


def _list_values(values: Iterable[str], table: str) -> str:
    return " OR ".join(f"{value} IN (SELECT entry FROM {table})" for value in values)


_LISTED = {
    "blocked_domain": _list_values(HOST_AND_ABOVE, "blocked_domains"),
    "blocked_hash": _list_values(HASHES, "blocked_hashes"),
}
RULES = tuple(
    Rule(one["reason"], one["fails"].format_map(_LISTED), tuple(one.get("needs", ())))
    for one in json.loads(Path(__file__).with_name("rules.json").read_text())
)
UNREADABLE_LINE = "unreadable_line"
"""A line of a text file that is not a row."""
REASONS = (
    UNREADABLE_LINE,
    *dict.fromkeys(rule.reason for rule in RULES),
    "withdrawn",
    "duplicate_in_source",
    "duplicate_across_sources",
    "no_entry",
    "too_frequent",
    "given_before",
    "not_selected",
)
"""Why a row is dropped: the first, in this order, that applies to it."""


def reason_expression(filters: FilterConfig) -> str:
    """SQL that gives the first rule a row fails, NULL for a row that passes."""
    on = (rule for rule in RULES if rule.is_on(filters))
    cases = "\n      ".join(f"WHEN {rule.fails} THEN '{rule.reason}'" for rule in on)
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
        **filters.model_dump(mode="json", exclude={"blocklists"}),
        "known_tags": [*KNOWN_TAGS, *filters.unsafe_tags],
    }
