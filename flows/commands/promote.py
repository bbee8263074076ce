"""`promote NAME/VERSION`: make a version champion by hand."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from evaclip_model.errors import InputError
from flows.config.profile import load_profile
from flows.console.terminal import console
from flows.promotion.promotion_events import announce_where_served

if TYPE_CHECKING:
    from tasks.register.promotion import How

HELP = "make a version champion that the gate would promote, or any with --force"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="NAME/VERSION", help="as evaclip/7")
    parser.add_argument("--alias", default="champion", help="alias that it takes over (champion)")
    parser.add_argument("--force", action="store_true", help="whatever the gate said of it")
    parser.add_argument("--reason", default="", help="why; kept with the version; --force needs it")


def run(parsed: argparse.Namespace) -> None:
    name, slash, number = parsed.model.removeprefix("models:/").rpartition("/")
    if not slash or not number.isdecimal():
        raise InputError(f"'{parsed.model}' names no version: give NAME/VERSION, as evaclip/7")
    if parsed.force and not parsed.reason.strip():
        raise InputError("--force needs --reason TEXT: it is kept with the version")
    from tasks.register.model_versions import registry
    from tasks.register.promotion import champion_of, promote, standing_of, who  # import mlflow

    with registry(load_profile().mlflow_uri) as (store, _):
        standing = standing_of(store, name, int(number))
        if not parsed.force and standing.gate != "promote":
            said = f"said {standing.gate.upper()}" if standing.gate else "was not asked"
            raise InputError(
                f"the gate {said} of {name}/{number}: add --force --reason TEXT to make it "
                f"{parsed.alias} all the same"
            )
        before = champion_of(store, name, parsed.alias)
        how: How = "force" if parsed.force else "command"
        moved = promote(store, name, parsed.alias, int(number), how, who(), parsed.reason)
    if moved:
        was = before.version if before else None
        announce_where_served(name, int(number), was, parsed.alias)
    console.print(f"{name}/{number} {'is' if moved else 'was'} {parsed.alias}", markup=False)
