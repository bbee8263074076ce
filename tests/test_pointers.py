"""Pointers in module docstrings lead somewhere: each file that "Not here: …" names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("evaclip_model", "tasks", "flows")


def pointers(module: Path) -> list[str]:
    """The Python files that the paragraph "Not here: …" of a module's docstring names."""
    text = ast.get_docstring(ast.parse(module.read_text())) or ""
    paragraph = re.search(r"\bNot here: (.*?)(?:\n\s*\n|\Z)", text, re.DOTALL)
    return re.findall(r"[\w./-]+\.py\b", paragraph[1]) if paragraph else []


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_not_here_is_in_the_file_that_is_named(package: str) -> None:
    """Named from the module's own folder, from its package, or from the root of the repository."""
    modules = list((ROOT / package).rglob("*.py"))
    lost = [
        f"{module.relative_to(ROOT)}: {file}"
        for module in modules
        for file in pointers(module)
        if not any((at / file).is_file() for at in (module.parent, ROOT / package, ROOT))
    ]
    assert lost == []
    assert sum(len(pointers(module)) for module in modules) > 10
