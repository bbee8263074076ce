"""Both command lines take what tests/golden/command_lines.json lists, and start without torch.

The list was first made from the argparse command lines that these replaced.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from evaclip_model.cli import commands as evaclip
from flows.__main__ import commands as flows

GOLDEN = Path(__file__).parent / "golden" / "command_lines.json"
HEAVY = ("torch", "prefect", "mlflow", "duckdb", "pandas", "pyarrow")


def describe(path: str, command: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Command path -> its help and parameters, for a command and all below it."""
    parameters = {}
    for one in command.params:
        is_option = one.param_type_name == "option"
        name = " ".join(one.opts) if is_option else one.metavar
        if name == "--help":
            continue
        kind = one.type_descriptor
        has_default = one.show_default is True and one.default not in (None, "", False)
        shown = f" (default: {one.show_default})" if isinstance(one.show_default, str) else ""
        about = {
            "help": (one.help or "") + shown,
            "required": one.required,
            "repeated": kind.is_list,
            "flag": bool(getattr(one, "is_flag", False)),
            "choices": list(kind.choices or ()),
            "default": str(one.default) if has_default else "",
        }
        parameters[name] = {key: value for key, value in about.items() if value or key == "help"}
    yield path, {"help": command.help, "parameters": parameters}
    for name, below in getattr(command, "commands", {}).items():
        yield from describe(f"{path} {name}", below)


def test_every_command_and_option_is_the_golden_files() -> None:
    found = {
        path: about
        for name, commands in (("python -m flows", flows), ("evaclip", evaclip))
        for path, about in describe(name, typer.main.get_command(commands))
    }
    assert found == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("module", ["flows", "evaclip_model.cli"])
def test_help_does_not_wait_for_what_commands_import(module: str) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        f"except SystemExit: print('imported:', *sys.modules.keys() & set({HEAVY}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Usage: " in ended.stdout, ended.stderr
    assert ended.stdout.splitlines()[-1] == "imported:"
