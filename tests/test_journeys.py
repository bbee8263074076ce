"""The four journeys of ARCHITECTURE.md lead from room to room as they say."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Room(NamedTuple):
    """One line of a journey."""

    file: str
    name: str
    """Function or class in it."""
    hands_on: str
    """Name of the file that the next room finds, `*.tar` for any of its kind; else empty."""


def read_journeys() -> dict[str, list[Room]]:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    section = page.split("## Four journeys")[1].split("\n## ")[0]
    journeys = {}
    for title, text in re.findall(r"\*\*(One \w+)\*\*\n\n(.*?)(?=\n\n|\Z)", section, re.DOTALL):
        lines = re.findall(r"^\d+\. `([\w/.]+): (\w+)`(.*)$", text, re.MULTILINE)
        assert len(lines) == len(text.splitlines()), f"{title}: a line of another form"
        arrows = [re.search(r"→ `([^`]+)`$", rest) for _, _, rest in lines]
        journeys[title] = [
            Room(file, name, arrow[1] if arrow else "")
            for (file, name, _), arrow in zip(lines, arrows, strict=True)
        ]
    return journeys


JOURNEYS = read_journeys()


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def file_of(module: str) -> str | None:
    """The module's file in this repository, if it is one of ours."""
    path = module.replace(".", "/")
    for file in (f"{path}.py", f"{path}/__init__.py"):
        if (ROOT / file).is_file():
            return file
    return None


@cache
def imports_of(file: str) -> dict[str, set[str]]:
    """Imported file -> names taken from it; a package passes on what it takes from its modules."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree_of(file)):
        pairs: list[tuple[str, str]] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            pairs = [(node.module, one.name) for one in node.names]
            pairs += [(f"{node.module}.{one.name}", one.name) for one in node.names]
        elif isinstance(node, ast.Import):
            pairs = [(one.name, "") for one in node.names]
        for module, name in pairs:
            target = file_of(module)
            if target is not None:
                found.setdefault(target, set()).add(name)
                if target.endswith("__init__.py") and target != file:
                    for behind, names in imports_of(target).items():
                        found.setdefault(behind, set()).update(names & {name})
    return {target: names for target, names in found.items() if names}


@cache
def texts_of(file: str) -> frozenset[str]:
    nodes = ast.walk(tree_of(file))
    return frozenset(
        node.value for node in nodes if isinstance(node, ast.Constant) and type(node.value) is str
    )


def knows_file(file: str, named: str) -> bool:
    """Tell whether a module has a file's name, or takes something from the module that has it."""
    own = texts_of(file)
    if named.startswith("*"):
        return any(text.endswith(named[1:]) for text in own)
    return named in own or any(named in texts_of(behind) for behind in imports_of(file))


def is_linked(before: list[Room], room: Room) -> bool:
    """Tell whether the last of the rooms before leads to this one or is asked by it, or one before
    called it."""
    last = before[-1]
    if last.hands_on:
        return knows_file(last.file, last.hands_on) and knows_file(room.file, last.hands_on)
    if last.file in imports_of(room.file):
        return True
    module = room.file.removesuffix(".py").replace("/", ".")
    return any(
        room.file == one.file or room.file in imports_of(one.file) or module in texts_of(one.file)
        for one in before
    )


def test_there_are_four_journeys() -> None:
    assert [*JOURNEYS] == ["One row", "One image", "One checkpoint", "One metric"]
    assert all(len(rooms) > 5 for rooms in JOURNEYS.values())


@pytest.mark.parametrize("title", JOURNEYS)
def test_every_room_is_defined_where_it_is_said_to_be(title: str) -> None:
    for room in JOURNEYS[title]:
        defined = {
            node.name
            for node in tree_of(room.file).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert room.name in defined, f"{room.file} has no {room.name}"


@pytest.mark.parametrize("title", JOURNEYS)
def test_every_room_leads_to_the_next(title: str) -> None:
    rooms = JOURNEYS[title]
    lost = [
        f"{rooms[place - 1].file} -> {rooms[place].file}"
        for place in range(1, len(rooms))
        if not is_linked(rooms[:place], rooms[place])
    ]
    assert lost == []


def test_a_journey_through_rooms_that_do_not_know_each_other_is_noticed() -> None:
    rows, images = JOURNEYS["One row"], JOURNEYS["One image"]
    assert not is_linked(rows[:4], images[-1])
    assert not is_linked([rows[0]], rows[-1])
    assert not is_linked([rows[0]._replace(hands_on="shards.json")], rows[1])
