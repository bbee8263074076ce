"""What the data of a recipe costs: rows, bytes, machines, days, each with where the rate is from.

Covers: the estimate of a recipe's merge and download, and its table.
Not here: one run's plan and disk check (run_plan.py); how much sources give
(flows/graph/source_yield.py); training.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from flows.config.recipe import Recipe
from flows.graph.source_yield import (
    SHARE_SELECTED,
    SourceYield,
    expected_samples,
    source_yields,
)
from tasks.download.url_tables import expected_bytes

LARGE_ROWS = 1_000_000
"""From here on an estimate is worth its lines."""
METADATA_BYTES_PER_ROW = 222
"""Re-LAION-2B: 467 GB of parquet for 2.1 billion rows."""
MERGE_ROWS_PER_CPU_S = 320_000
"""`make bench-merge`: 314,000 to 324,000 at 5 to 20 million rows, two threads."""
WAITING_BYTES = 245
"""Temporary disk of a row read, until its partition is written; `make bench-merge`."""
URLS_PER_MACHINE_S = 1_000
"""img2dataset's documentation: one 16-core machine (c6i.4xlarge) at 256 to 384 px."""
MACHINES = 10
"""What LAION used for LAION-5B in seven days."""


@dataclass(frozen=True)
class Line:
    """One figure of an estimate."""

    what: str
    figure: str
    origin: str


def is_large(recipe: Recipe) -> bool:
    """Whether a recipe's caps make an estimate worth printing; without caps nobody knows."""
    return sum(reach.wanted for reach in source_yields(recipe)) >= LARGE_ROWS


def estimate_data(recipe: Recipe, machines: int = MACHINES) -> list[Line]:
    """The figures of a recipe whose sources all have a `target_count`."""
    reaches = source_yields(recipe)
    wanted = sum(reach.selected for reach in reaches)
    samples = expected_samples(recipe)
    published = recipe.published.metadata_rows
    read = sum(published.get(reach.source.name, reach.wanted / SHARE_SELECTED) for reach in reaches)
    per_shard = recipe.download.samples_per_shard
    days = wanted / (URLS_PER_MACHINE_S * machines) / 86_400
    image_px = recipe.download.image_px
    caps = " + ".join(
        f"{source.target_count or 0:,} {source.name} at {source.expected_success:.0%} success"
        for source in recipe.merge.sources
    )
    return [
        Line("samples, at most", f"{sum(r.source.target_count or 0 for r in reaches):,}", caps),
        *(_shortfall_line(reach) for reach in reaches if reach.selected < reach.wanted),
        Line("rows selected", f"{wanted:,}", "target_count / expected_success, or all there are"),
        Line(
            "metadata rows read",
            f"{read:,.0f}",
            "as published" if published else f"{SHARE_SELECTED:.0%} of rows are selected",
        ),
        Line(
            "metadata",
            f"{read * METADATA_BYTES_PER_ROW / 1e9:,.0f} GB, read once",
            f"{METADATA_BYTES_PER_ROW} bytes a row, as Re-LAION-2B",
        ),
        Line(
            "merge",
            f"{read / MERGE_ROWS_PER_CPU_S / 3600:,.1f} CPU-hours",
            f"{MERGE_ROWS_PER_CPU_S:,} rows per CPU-second, make bench-merge",
        ),
        Line(
            "merge, temporary disk",
            f"{read * WAITING_BYTES / 1e9:,.0f} GB",
            f"{WAITING_BYTES} bytes a row until it is written, make bench-merge",
        ),
        Line("shards", f"{-(-wanted // per_shard):,}", f"{per_shard:,} rows each"),
        Line(
            "images",
            f"{expected_bytes(samples, image_px) / 1e12:,.1f} TB",
            f"{expected_bytes(1, image_px):,} bytes a sample at {image_px} px",
        ),
        Line(
            f"download on {machines} machines",
            f"{days:,.1f} days",
            f"{URLS_PER_MACHINE_S:,} URLs/s on 16 cores, img2dataset's documentation",
        ),
    ]


def _shortfall_line(reach: SourceYield) -> Line:
    return Line(
        f"{reach.source.name} can give",
        f"about {reach.samples:,} samples, not {reach.source.target_count or 0:,}",
        f"{reach.selected:,} of its rows pass ({SHARE_SELECTED:.0%}), "
        f"{reach.source.expected_success:.0%} are downloaded",
    )


def estimate_table(recipe: Recipe) -> Table:
    """The estimate for a terminal."""
    table = Table("estimate", "figure", "from", box=None, pad_edge=False)
    for line in estimate_data(recipe):
        table.add_row(line.what, line.figure, line.origin)
    return table
