"""What others wrote reaches the terminal as they wrote it."""

from __future__ import annotations

import io
import pickle

import pytest
from rich.table import Table

from evaclip_model.errors import InputError
from flows.reporting import terminal

OTHERS = "[red]x[/] :smile: [/nothing]"
"""Markup of rich's, a name of an emoji, and an end without a beginning, at which rich raises."""


def test_text_that_looks_like_markup_is_printed_as_it_is() -> None:
    table = Table(OTHERS, box=None)
    table.add_row(OTHERS)
    with terminal.console.capture() as shown:
        terminal.console.print(OTHERS, style="bold")
        terminal.console.print(table)
    assert shown.get().count(OTHERS) == 3


def test_a_sentence_for_the_user_holds_no_control_characters_wherever_it_is_logged() -> None:
    error = InputError("a\x1b[2J\u202eb.csv is\na pipe")
    assert str(error) == "a\\x1b[2J\\u202eb.csv is\na pipe"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert len(str(InputError("x" * 1_000_000 + " is too long"))) < 10_000


def test_a_bar_shows_titles_and_details_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = terminal.PlainConsole(force_terminal=True, width=200, file=file)
    monkeypatch.setattr(terminal, "console", console)
    with terminal.moving_bar("pull [/x]") as report:
        report(1, 2, f"{OTHERS} \x1b[2J")
    assert "pull [/x]" in file.getvalue()
    assert f"{OTHERS} \\x1b[2J" in file.getvalue()
