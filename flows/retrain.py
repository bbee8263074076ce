"""Scheduled retraining: what is new since the last time, from metadata to a gated model."""

from __future__ import annotations

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from flows.parameters import Overrides, RecipeName
from flows.pipeline import pipeline


@flow(name="retrain")
def retrain(
    recipe: RecipeName = "demo",
    overrides: Overrides = (),
    promote: Literal["gate", "never", "ask"] = "gate",
    min_new_rows: Annotated[int, Field(ge=1)] = 1,
    keep_rejected: bool = False,
    dry_run: bool = False,
) -> None:
    """Look for new metadata; if there is any, download that alone, train on from the champion,
    compare, and let the gate decide. Nothing new: it ends, saying so.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
        promote: What happens to a better model. gate: it becomes champion; ask: once a person has
            said yes; never: it stays challenger.
        min_new_rows: Fewer new rows than this wait for the next time.
        keep_rejected: Train on the data of rejected models again, instead of setting it aside.
        dry_run: Only say what is new and what would be made.
    """
    pipeline(recipe, overrides, promote, dry_run)
