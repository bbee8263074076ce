"""The command line: `python -m flows COMMAND`; the commands are in flows/commands.

Exit codes: 0 done, 1 doctor found a failure, 2 a user's mistake, 130 interrupted.
"""

import sys
from collections.abc import Sequence

from typer import Typer
from typer.exceptions import TyperException

from evaclip_model.errors import InputError, escape_control
from flows.commands.data import find, lineage, prune, sources, takedown, trace
from flows.commands.evalsets import evalsets
from flows.commands.models import promote, pull, rollback
from flows.commands.recipes import doctor, list_recipes, plan, show
from flows.commands.run import run, score
from flows.reporting.terminal import console

INTERRUPTED = 130

commands = Typer(
    help="The command line of the pipeline: metadata in, a registered EVA-CLIP model out.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands.command("list")(list_recipes)
for command in (
    *(show, plan, doctor, run, score, trace, find, lineage, takedown, prune),
    *(pull, promote, rollback),
):
    commands.command()(command)
commands.add_typer(sources, name="sources")
commands.add_typer(evalsets, name="evalsets")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        status = commands(arguments, prog_name="python -m flows", standalone_mode=False)
    except (InputError, TyperException, OSError) as error:
        console.file.flush()
        text = error.format_message() if isinstance(error, TyperException) else str(error)
        print(f"error: {escape_control(text)}", file=sys.stderr)
        return 2
    if status == INTERRUPTED:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
