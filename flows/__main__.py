"""The command line: `python -m flows COMMAND`; each command is a module of flows/commands.

Covers: which commands there are, exit codes (0 done, 2 a user's mistake, 130 interrupted).
Not here: any work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from evaclip_model.errors import InputError
from flows.commands import (
    doctor,
    evalsets,
    lineage,
    plan,
    promote,
    pull,
    rollback,
    run,
    score,
    show,
    sources,
    takedown,
    trace,
)
from flows.commands import list as list_everything
from flows.console.terminal import console

COMMANDS = {
    "list": list_everything,
    "show": show,
    "plan": plan,
    "doctor": doctor,
    "run": run,
    "score": score,
    "trace": trace,
    "lineage": lineage,
    "takedown": takedown,
    "sources": sources,
    "evalsets": evalsets,
    "pull": pull,
    "promote": promote,
    "rollback": rollback,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.command(parsed)
    except InputError as error:
        console.file.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, module in COMMANDS.items():
        added = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.arguments(added)
        added.set_defaults(command=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
