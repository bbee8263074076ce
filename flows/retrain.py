"""Scheduled retraining: what is new since the last time, from metadata to a judged model.

Covers: the order of work; what it says at the end.
Not here: what is new (increment.py), the gate (gate.py), when it runs (infra/prefect.yaml).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from evaclip_model.training.config import METRICS_FILE, MODEL_FOLDER, RESULT_FILE
from flows.config.form_types import Overrides, RecipeName
from flows.config.recipe import Recipe
from flows.console.terminal import console
from flows.evaluate import evaluate
from flows.graph.graph import Chart, load_chart
from flows.graph.incremental import (
    News,
    describe,
    draw_retraining,
    increment,
    look,
    part_of,
    rows_of,
)
from flows.graph.runner import Session, open_session
from flows.prepare import choose, fetch, prepare
from flows.promotion.apply_decision import (
    CHAMPION,
    TRAINED,
    Promote,
    champions_folder,
    register_and_judge,
    settle,
)
from flows.promotion.compare_models import measure
from flows.reporting.crash_hook import close_tracking
from flows.reporting.prefect_artifacts import metadata_read, publish_evaluation, publish_overview
from flows.train import train
from tasks.artifacts.artifact import Artifact
from tasks.demo.task import demo
from tasks.initialise.task import initialise
from tasks.join.config import JoinConfig
from tasks.join.task import join
from tasks.merge.task import merge
from tasks.register.promotion import read_decision
from tasks.tracking import TrackingStore
from tasks.train.task import train_stage


@flow(name="retrain", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def retrain(
    recipe: RecipeName = "demo",
    overrides: Overrides = (),
    promote: Promote = "gate",
    min_new_rows: Annotated[int, Field(ge=1)] = 1,
    keep_rejected: bool = False,
    dry_run: bool = False,
) -> Artifact | None:
    """Look for new metadata; if there is any, download that alone, train on from the champion,
    compare, and let the gate decide. Nothing new: it ends, saying so.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
        promote: What happens to a better model. gate: it becomes champion; ask: once a person has
            said yes; never: it stays challenger.
        min_new_rows: Fewer new rows than this wait for the next time.
        keep_rejected: Train on the data of rejected models again, instead of setting it aside.
        dry_run: Only say what is new.

    Returns:
        The registration, if a model was trained.
    """
    wanted, profile, chart = load_chart(recipe, overrides)
    store = TrackingStore.at(profile.mlflow_uri, wanted.name)
    if wanted.demo and chart.demo and not chart.demo.is_finished:
        with open_session("retrain", recipe, overrides) as session:
            session.make(demo, chart.demo, wanted.demo)
            chart = load_chart(recipe, overrides)[2]
    news = look(wanted, chart, store, keep_rejected)
    for line in describe(news, wanted):
        console.print(line, soft_wrap=True, markup=False)
    if dry_run or news.is_nothing:
        _tell(wanted, news, "nothing was made")
        if not dry_run:
            _settle_last(wanted, store, news, promote)
        return None
    with open_session("retrain", recipe, overrides) as session:
        if news.is_first:
            shards = prepare(recipe, overrides)
            registered = evaluate(recipe, overrides, train(recipe, overrides, shards))
        else:
            merges = [*news.waiting, *_merge_what_is_new(session, news)]
            rows = rows_of(merges)
            if rows < min_new_rows:
                few = f"{rows:,} new rows, {min_new_rows:,} are asked for: they wait"
                end = few if rows else "nothing new: no row of the new files is new"
                console.print(end, markup=False)
                _tell(wanted, news, end)
                _settle_last(wanted, store, news, promote)
                return None
            registered, chart = _train_on(session, news, merges)
        _tell(wanted, news, read_decision(registered.folder).summary)
        publish_overview(session, chart)
    settle(wanted.registry, store, registered, promote)
    return registered


def _merge_what_is_new(session: Session, news: News) -> list[Artifact]:
    """The merge of the new files, if there are any and their sources take more rows."""
    planned = increment(session.recipe, session.chart, news) if news.files else None
    if planned is None:
        return []
    address, config = planned
    files = {source.name: news.files[source.name] for source in config.sources}
    workers = session.profile.merge_workers
    read = partial(metadata_read, config=config)
    return [session.make(merge, address, config, files, workers, news.known, outside=read)]


def _train_on(session: Session, news: News, merges: Sequence[Artifact]) -> tuple[Artifact, Chart]:
    """From merges of what is new to a registered and judged model; it, and the chart it is on."""
    made = [one for merged in merges if rows_of([merged]) for one in _part(session, merged)]
    verified = [*news.used, *(one for one in made if one.kind == "verify")]
    chart, joined = draw_retraining(
        session.recipe, session.chart, news, [one.digest for one in verified]
    )
    data = verified[0]
    if joined is not None:
        data = session.make(join, joined, JoinConfig(), verified)
    shards = choose(session, [*made, data], chart.dataset)
    model = _trained(session, news, chart, shards)
    evaluated = _evaluated(session, news, chart, model)
    publish_evaluation(evaluated, session.run.stage_url(chart.evaluate))
    return register_and_judge(session, chart.register, model, evaluated), chart


def _part(session: Session, merged: Artifact) -> tuple[Artifact, Artifact, Artifact]:
    """A merge with its download and verification."""
    download_at, verify_at = part_of(session.recipe, merged, session.root)
    return merged, *fetch(session, merged, download_at, verify_at)


def _trained(session: Session, news: News, chart: Chart, shards: Artifact) -> Artifact:
    """The champion, or else the recipe's beginning, trained on."""
    recipe = session.recipe
    model = news.start or session.make(initialise, chart.initialise, recipe.initialise)
    stages = recipe.retraining() if news.start else recipe.train
    for config, address in zip(stages, chart.train, strict=True):
        model = session.make(
            *(train_stage, address, config, model, shards, session.profile.launch),
            title=f"train {config.name}",
            inputs={"training": shards},
            attach=(METRICS_FILE, RESULT_FILE),
            follow=METRICS_FILE,
        )
    return model


def _evaluated(session: Session, news: News, chart: Chart, model: Artifact) -> Artifact:
    """The new model beside the champion, or beside where it began."""
    if news.champion:
        other = {CHAMPION: champions_folder(session, news.champion)}
    else:
        other = {"untrained": chart.initialise.folder / MODEL_FOLDER}
    models: dict[str, Path] = {TRAINED: model.folder / MODEL_FOLDER, **other}
    curves = [address.folder / METRICS_FILE for address in chart.train]
    return measure(session, chart.evaluate, models, curves, chart.dataset)


def _settle_last(recipe: Recipe, store: TrackingStore, news: News, wanted: Promote) -> None:
    """Carry out what the gate said of the last model, where a run was killed before it did."""
    if news.last is not None:
        settle(recipe.registry, store, news.last.registered, wanted)


def _tell(recipe: Recipe, news: News, end: str) -> None:
    """What was found and what came of it, as an artifact of the flow run."""
    lines = "\n".join(describe(news, recipe))
    page = f"# Retraining of {recipe.registry.model_name}\n\n```\n{lines}\n```\n\n{end}\n"
    create_markdown_artifact(page, key="retraining")
