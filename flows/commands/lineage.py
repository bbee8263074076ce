"""`lineage WHAT`: what a model was made from, what was made of a dataset or a source."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from evaclip_model.errors import InputError
from flows.config.profile import Profile, load_profile
from flows.console.terminal import console
from tasks.tracking import TrackingStore

HELP = "what a model was made from; what was made of a dataset or a source"


def arguments(parser: argparse.ArgumentParser) -> None:
    what = "NAME@ALIAS or NAME/VERSION of a model, a digest of anything made, or a source's name"
    parser.add_argument("what", help=what)
    alias = "whose last holder a model is compared with (default: champion)"
    parser.add_argument("--alias", default="champion", help=alias)
    parser.add_argument("--svg", type=Path, help="of a model: write the picture to this file, too")


def run(parsed: argparse.Namespace) -> None:
    profile = load_profile()
    from tasks.register.model_versions import is_address  # imports mlflow

    if is_address(parsed.what):
        lines = _of_a_model(profile, parsed.what, parsed.alias, parsed.svg)
    elif parsed.svg is not None:
        raise InputError("--svg draws a model: name it as NAME@ALIAS or NAME/VERSION")
    else:
        lines = _of_data(profile, parsed.what)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _of_a_model(profile: Profile, what: str, alias: str, svg: Path | None) -> Iterator[str]:
    from flows.audit.lineage_tree import version_tree
    from tasks.lineage.lineage_svg import lineage_svg
    from tasks.register.model_versions import describe, predecessor

    version = describe(profile.mlflow_uri, what)
    yield from version_tree(version, predecessor(profile.mlflow_uri, version, alias))
    if svg is not None and version.lineage is not None:
        aliases = "".join(f" @{alias}" for alias in version.aliases)
        svg.write_text(lineage_svg(version.lineage, f"{version}{aliases}"))
        yield f"\nthe picture is in {svg}"


def _of_data(profile: Profile, what: str) -> Iterator[str]:
    from flows.audit.lineage_tree import artifact_trees, find, source_trees
    from tasks.register.model_versions import made_from

    root = profile.root.resolve()
    found = find(root, what)
    database = TrackingStore.at(profile.mlflow_uri, "").database
    is_there = database is None or database.is_file()
    digest = found[0].digest if found else what
    versions = made_from(profile.mlflow_uri, digest) if is_there else []
    for artifact in found:
        yield from artifact_trees(artifact, root)
    if not found and not versions:
        yield from source_trees(root, what)
    if versions:
        yield f"\nregistered from it: {', '.join(versions)}"
