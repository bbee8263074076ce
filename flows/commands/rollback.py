"""`rollback NAME`: the version that was champion before is champion again."""

from __future__ import annotations

import argparse

from flows.config.profile import load_profile
from flows.console.terminal import console
from flows.promotion.promotion_events import announce_where_served

HELP = "make the version champion again that was it before"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="of the registered model")
    parser.add_argument("--to", type=int, metavar="VERSION", help="another one than the last")
    parser.add_argument("--alias", default="champion", help="alias that goes back (champion)")
    parser.add_argument("--reason", default="", help="why; kept with the version")


def run(parsed: argparse.Namespace) -> None:
    from tasks.register.model_versions import registry
    from tasks.register.promotion import history, roll_back, who  # imports mlflow

    with registry(load_profile().mlflow_uri) as (store, _):
        before, now = roll_back(store, parsed.name, parsed.alias, parsed.to, who(), parsed.reason)
        moves = history(store, parsed.name, parsed.alias)
    announce_where_served(parsed.name, now, before, parsed.alias)
    console.print(f"{parsed.name}@{parsed.alias}: version {before} -> {now}", markup=False)
    for move in moves:
        why = f": {move.why}" if move.why else ""
        text = f"  {move.at[:19]}  version {move.version}  {move.how} by {move.by}{why}"
        console.print(text, soft_wrap=True, markup=False)
