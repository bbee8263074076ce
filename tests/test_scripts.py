"""Benchmarks and fault runs take long and run seldom: that they would start is seen here."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = sorted([*HERE.glob("benchmarks/*.py"), *HERE.glob("faults/*.py")])
OWN = ("evaclip_model", "tasks", "flows")


def asked_for(script: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import from this project's packages, wherever it stands."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in OWN:
            yield from ((str(node.module), one.name) for one in node.names)


def is_there(module: str, name: str) -> bool:
    found = importlib.import_module(module)
    is_package = hasattr(found, "__path__")
    return hasattr(found, name) or (is_package and find_spec(f"{module}.{name}") is not None)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_imports_is_there(script: Path) -> None:
    missing = [asked for asked in asked_for(script) if not is_there(*asked)]
    assert not missing
