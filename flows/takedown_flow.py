"""A takedown (flows/audit/dataset_replacement.py) as a flow, for a deployment with a form."""

from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from flows.audit.dataset_replacement import describe_replacement, describe_unmatched, take_down
from flows.config.profile import load_profile


@flow(name="takedown")
def takedown(file: Annotated[str, Field(min_length=1)]) -> list[str]:
    """Replace every dataset version that holds a sample named in a list; name the models.

    Args:
        file: Path of a text file, as the worker sees it: URLs, uids or SHA-256s, one a line.
    """
    root = load_profile().root.resolve()
    done = take_down(Path(file), root)
    lines = [line for one in done for line in describe_replacement(one, root)]
    lines = lines or ["no dataset version holds any of these samples"]
    said = "\n".join([*lines, *describe_unmatched(Path(file), root)])
    create_markdown_artifact(f"# Takedown of `{file}`\n\n```\n{said}\n```", key="takedown")
    return [one.new.digest for one in done]
