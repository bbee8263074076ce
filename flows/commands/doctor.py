"""`doctor`: whether this machine is ready, and with `--recipe` ready for one."""

from __future__ import annotations

import argparse
import sys

from flows.config.profile import load_profile
from flows.console.terminal import console
from flows.graph.graph import load_chart
from flows.planning.feasibility import Finding, Machine, recipe_findings
from flows.planning.health_checks import examine, weights

HELP = "whether this machine is ready: versions, disk, stores, servers, GPUs, and what to do"
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", help="what this recipe needs too: its name or .toml file")


def run(parsed: argparse.Namespace) -> None:
    levels = [_say(finding) for finding in examine(load_profile())]
    if parsed.recipe:
        recipe, profile, chart = load_chart(parsed.recipe, ())
        machine = Machine.here(profile.root.resolve())
        levels += [_say(one) for one in recipe_findings(recipe, chart, profile, machine)]
        levels += [_say(one) for one in weights(recipe)]
    failed, warned = levels.count("fail"), levels.count("warn")
    console.print(f"{len(levels)} looked at, {failed} failed, {warned} to look at")
    if failed:
        sys.exit(1)


def _say(finding: Finding) -> str:
    console.print(f"[{COLOURS[finding.level]}]{finding.level:4}[/]  ", end="")
    do = f" -> {finding.do}" if finding.do else ""
    console.print(f"{finding.what}: {finding.found}{do}", soft_wrap=True, markup=False)
    return finding.level
