"""Commands, options, links and imports that the pages for users show are there."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = json.loads((ROOT / "tests/golden/command_lines.json").read_text())
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "infra/README.md"]
    if path.name not in ("CHANGELOG.md", "BENCHMARKS.md")  # of what was, too
)


def read_commands(page: str) -> list[list[str]]:
    """Every command line of ours that a page shows, in words."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = []
    for line in lines:
        ours = re.match(r"\s*(?:\w+=\S+ )*((?:python -m flows|evaclip) [a-z].*)", line)
        if ours:
            found.append(shlex.split(ours[1].replace("…", "").replace("...", ""), comments=True))
    return found


def explain_mistake(words: list[str]) -> str:
    """Say which command or option of a command line is not there; empty if all are."""
    path, rest = ("python -m flows", words[3:]) if words[0] == "python" else ("evaclip", words[1:])
    while rest and f"{path} {rest[0]}" in COMMANDS:
        path, rest = f"{path} {rest[0]}", rest[1:]
    if path in ("python -m flows", "evaclip"):
        return f"{' '.join(words)}: there is no such command"
    known = {name for names in COMMANDS[path]["parameters"] for name in names.split()}
    options = {word.partition("=")[0] for word in rest if word.startswith("-")} - {"--help"}
    return f"{path} has no {', '.join(options - known)}" if options - known else ""


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_that_a_page_shows_are_there(page: str) -> None:
    assert [said for words in read_commands(page) if (said := explain_mistake(words))] == []


def test_commands_are_read_and_mistakes_noticed() -> None:
    assert len(read_commands("README.md")) > 20
    assert explain_mistake(["python", "-m", "flows", "plan", "demo", "--gpu", "x"])
    assert explain_mistake(["evaclip", "clasify", "x.png"])
    assert not explain_mistake(["evaclip", "models"])


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
    lost = [to for to in links if "://" not in to and not (folder / to).exists()]
    assert lost == []


def test_the_first_result_is_within_the_first_40_lines() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any("trained" in line for line in lines[:40]) and "make demo" in lines[:40]


def test_the_library_has_what_the_page_imports_and_calls() -> None:
    text = (ROOT / "README.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and "evaclip" in node.module:
                module = importlib.import_module(node.module)
                assert [one.name for one in node.names if not hasattr(module, one.name)] == []
    library = importlib.import_module("evaclip_model")
    section = text.split("## The model library")[1].split("\n## ")[0]
    rows = "\n".join(re.findall(r"(?m)^\|.*\|$", section))
    called = set(re.findall(r"(?<![.\w])([a-z]+_[a-z_]+)\(", rows))
    assert len(called) > 8
    assert [name for name in called if not hasattr(library, name)] == []
