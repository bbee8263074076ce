"""From metadata to a dataset version."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from prefect import flow
from prefect.artifacts import create_table_artifact

from flows.audit.dataset_replacement import obeying
from flows.config.form_types import Overrides, RecipeName
from flows.graph.graph import find_all, find_files
from flows.graph.runner import Session, open_session
from flows.reporting.crash_hook import close_tracking
from flows.reporting.prefect_artifacts import metadata_read
from flows.reporting.run_summary import per_source
from tasks.artifacts.artifact import CARD, Address, Artifact
from tasks.dataset.config import RULES_IN_FILES
from tasks.dataset.dataset import OutsideFiles
from tasks.dataset.lists import read_takedowns
from tasks.dataset.task import dataset
from tasks.demo.config import DemoConfig
from tasks.demo.demo_web import serving
from tasks.demo.task import demo
from tasks.download.download import PROGRESS, Crew
from tasks.download.task import download
from tasks.merge.task import merge
from tasks.verify.task import verify


@flow(name="prepare", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def prepare(recipe: RecipeName = "demo", overrides: Overrides = ()) -> Artifact:
    """Merge the sources' metadata, download the images, verify every shard, choose samples.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
    """
    with open_session("prepare", recipe, overrides) as session:
        chart, wanted, profile = session.chart, session.recipe, session.profile
        world = [session.make(demo, chart.demo, wanted.demo)] if chart.demo and wanted.demo else []
        files = {
            source.name: find_files(source.files, chart.demo, f"merge.sources '{source.name}'")
            for source in wanted.merge.sources
        }
        merged = session.make(
            *(merge, chart.merge, wanted.merge, files, profile.merge_workers, ()),
            outside=partial(metadata_read, config=wanted.merge),
            after=world,
        )
        downloaded, verified = fetch(session, merged, chart.download, chart.verify)
        version = choose(session, (merged, downloaded, verified), chart.dataset)
        create_table_artifact(
            per_source((merged, downloaded), version),
            key="sources",
            description="What became of every source's rows",
        )
        return version


def fetch(
    session: Session, merged: Artifact, download_at: Address, verify_at: Address
) -> tuple[Artifact, Artifact]:
    """Download what a merge selected, and verify it; the download and the verification."""
    wanted, profile = session.recipe, session.profile
    crew = Crew(profile.download_processes, profile.download_threads, profile.download_distributor)
    web = nullcontext() if download_at.is_finished else _web(wanted.demo)
    with web:
        downloaded = session.make(
            *(download, download_at, wanted.download, merged, crew),
            inputs={"merged": merged},
            follow=PROGRESS,
        )
    verified = session.make(
        *(verify, verify_at, wanted.verify, downloaded), inputs={"downloaded": downloaded}
    )
    return downloaded, verified


def choose(session: Session, ancestors: Sequence[Artifact], address: Address) -> Artifact:
    """The dataset version at `address`, of the last of `ancestors`, by the recipe's rules."""
    chart, rules = session.chart, session.recipe.dataset
    outside = OutsideFiles(
        *(
            tuple(find_all(getattr(rules, name), chart.demo, f"dataset.{name}"))
            for name in RULES_IN_FILES
        )
    )
    lists = find_all(rules.takedowns, chart.demo, "dataset.takedowns")
    return session.make(
        *(dataset, address, rules, ancestors, outside),
        obeying(read_takedowns(lists), address),
        inputs={"verified": ancestors[-1]},
        attach=(CARD,),
    )


def _web(demo: DemoConfig | None) -> AbstractContextManager[None]:
    """The demo's loopback web while a recipe that has one downloads from it."""
    return serving(demo) if demo else nullcontext()
