"""From metadata to a dataset version."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from prefect import flow

from flows.chart import find_all, find_files
from flows.parameters import Overrides, RecipeName
from flows.session import open_session
from flows.takedown import obeying
from tasks.artifact import CARD, Artifact
from tasks.dataset.config import RULES_IN_FILES
from tasks.dataset.dataset import OutsideFiles
from tasks.dataset.lists import read_takedowns
from tasks.dataset.task import dataset
from tasks.demo.config import DemoConfig
from tasks.demo.task import demo
from tasks.demo.web import serving
from tasks.download.download import PROGRESS, Crew
from tasks.download.task import download
from tasks.merge.task import merge
from tasks.verify.task import verify


@flow(name="prepare")
def prepare(recipe: RecipeName = "demo", overrides: Overrides = ()) -> Artifact:
    """Merge the sources' metadata, download the images, verify every shard, choose samples.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
    """
    with open_session("prepare", recipe, overrides) as session:
        chart, wanted, profile = session.chart, session.recipe, session.profile
        if chart.demo and wanted.demo:
            session.make(demo, chart.demo, wanted.demo)
        files = {
            source.name: find_files(source.files, chart.demo, f"merge.sources '{source.name}'")
            for source in wanted.merge.sources
        }
        merged = session.make(merge, chart.merge, wanted.merge, files, profile.merge_workers)
        crew = Crew(
            profile.download_processes, profile.download_threads, profile.download_distributor
        )
        web = nullcontext() if chart.download.is_finished else _web(wanted.demo)
        with web:
            downloaded = session.make(
                *(download, chart.download, wanted.download, merged, crew),
                inputs={"merged": merged},
                follow=PROGRESS,
            )
        verified = session.make(
            *(verify, chart.verify, wanted.verify, downloaded), inputs={"downloaded": downloaded}
        )
        rules = wanted.dataset
        outside = OutsideFiles(
            *(
                tuple(find_all(getattr(rules, name), chart.demo, f"dataset.{name}"))
                for name in RULES_IN_FILES
            )
        )
        lists = find_all(rules.takedowns, chart.demo, "dataset.takedowns")
        return session.make(
            *(dataset, chart.dataset, rules, (merged, downloaded, verified), outside),
            obeying(read_takedowns(lists), chart.dataset),
            inputs={"verified": verified},
            attach=(CARD,),
        )


def _web(demo: DemoConfig | None) -> AbstractContextManager[None]:
    """The demo's loopback web while a recipe that has one downloads from it."""
    return serving(demo) if demo else nullcontext()
