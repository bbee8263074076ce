"""How many samples a recipe's capped sources will give.

A cap counts samples; what is asked for is more, by each source's `expected_success`, but never more
than the published metadata can give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flows.config.recipe import Recipe
from tasks.merge.config import SourceConfig

SHARE_SELECTED = 0.65
"""Rows selected of rows read: COYO has 12 % duplicate URLs, rules and overlaps take the rest."""


@dataclass(frozen=True)
class SourceYield:
    """What a source can give."""

    source: SourceConfig
    wanted: int
    """Rows that its cap asks for."""
    there: int | None
    """Rows of its metadata that pass; none where nobody has counted them."""

    @property
    def selected(self) -> int:
        return self.wanted if self.there is None else min(self.wanted, self.there)

    @property
    def samples(self) -> int:
        """Of the selected rows, after the download."""
        cap = self.source.target_count or 0
        return min(cap, math.floor(self.selected * self.source.expected_success))


def source_yields(recipe: Recipe) -> list[SourceYield]:
    """What each source can give, in the recipe's order."""
    published = recipe.published.metadata_rows
    return [
        SourceYield(
            source,
            source.wanted_rows or 0,
            math.floor(published[source.name] * SHARE_SELECTED)
            if source.name in published
            else None,
        )
        for source in (recipe.merge_table.sources if recipe.merge_table else ())
    ]


def expected_samples(recipe: Recipe) -> int:
    """Samples after the download of a recipe's capped sources."""
    return sum(one.samples for one in source_yields(recipe))
