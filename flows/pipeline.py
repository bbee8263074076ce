"""The flows of a recipe: the whole way from metadata to a registered model, its three parts, the
scheduled retraining from what is new since the last time to a judged model. Beside them takedowns,
and any models on any sets, outside a recipe's training: figures and a report, nothing registered.
Not here: what is new (flows/graph/incremental.py), the gate (tasks/register/gate.py), when flows
run (infra/prefect.yaml), what the arguments of `score` mean (flows/graph/score_request.py)."""

from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from flows.audit.sample_trace import describe_replacement, describe_unmatched, take_down
from flows.config.profile import load_profile
from flows.config.recipe import Recipe
from flows.config.recipe_loader import Overrides, RecipeName
from flows.graph import incremental
from flows.graph.graph import Graph, data_steps, load_graph, verify_step
from flows.graph.incremental import News, of_kind, rows_of
from flows.graph.outside_data import fetch_model
from flows.graph.runner import RecipeSession, Session, open_session, track_run
from flows.graph.score_request import read_asked
from flows.graph.step import Step
from flows.planning import run_plan
from flows.promotion import apply_decision as deciding
from flows.reporting.crash_hook import close_tracking
from flows.reporting.prefect_artifacts import publish_evaluation, publish_overview, publish_sources
from flows.reporting.terminal import console
from tasks.adopt.config import STAGE as ADOPT
from tasks.artifacts.artifact import Artifact, Role
from tasks.evaluate.sets.set_registry import FOLDER
from tasks.merge.config import STAGE as MERGE
from tasks.register.promotion import read_decision
from tasks.tracking import TrackingStore

EXPERIMENT = "scores"  # of the tracking store
Models = Annotated[list[str], Field(min_length=1)]
ScoredRecipe = Annotated[str, Field(pattern=r"^$|^[A-Za-z0-9][\w.-]*$|^.+[.]toml$")]


@flow(name="pipeline", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def pipeline(
    recipe: RecipeName = "demo",
    overrides: Overrides = (),
    promote: deciding.Promote = "gate",
    dry_run: bool = False,
) -> None:
    """Prepare the data, train, evaluate, register; the gate decides which model is champion.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
        promote: What happens to a better model. gate: it becomes champion; ask: once a person has
            said yes; never: it stays challenger.
        dry_run: Only write the plan: what would run, what is there, the sizes, does it fit here.
    """
    if dry_run:
        wanted, profile, graph = load_graph(recipe, overrides)
        machine = run_plan.Machine.this_machine(profile.root.resolve())
        fits = run_plan.summarise_findings(
            run_plan.recipe_findings(wanted, graph, profile, machine)
        )
        page = f"{run_plan.plan_markdown(wanted, graph)}\n\nDoes it fit this machine? {fits}"
        create_markdown_artifact(page, key="plan")
        return
    if deciding.carry_out_answer(recipe, overrides, promote) is not None:
        return
    with open_session("pipeline", recipe, overrides) as session:
        run_plan.check_disk(session.graph)
        prepare_data(session)
        session.graph.require_samples()
        session.make_all(session.graph.model_steps)
        registered = evaluate_and_register(session, session.graph)
        publish_overview(session, session.graph)
    deciding.apply_decision(session.recipe.registry, session.store, registered, promote)


@flow(name="prepare", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def prepare(recipe: RecipeName = "demo", overrides: Overrides = ()) -> Artifact:
    """Merge the sources' metadata, download the images, verify every shard, choose samples.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
    """
    with open_session("prepare", recipe, overrides) as session:
        return prepare_data(session)


def prepare_data(session: RecipeSession) -> Artifact:
    """Everything up to the recipe's dataset version; returns that. What was adopted and is less
    than training takes at once is refused."""
    for step in session.graph.data_steps:
        session.make_step(step)
        if step.stage is ADOPT:
            session.graph.require_samples()
    version = session.made[session.graph.dataset.digest]
    publish_sources(version, session.root)
    return version


@flow(name="train", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def train(recipe: RecipeName = "demo", overrides: Overrides = ()) -> Artifact:
    """Make the starting weights, then run every training stage of the recipe.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
    """
    with open_session("train", recipe, overrides) as session:
        session.require_finished(session.graph.dataset, "prepare")
        session.graph.require_samples()
        session.make_all(session.graph.model_steps)
        return session.made[session.graph.train[-1].digest]


@flow(name="evaluate", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def evaluate(
    recipe: RecipeName = "demo", overrides: Overrides = (), promote: deciding.Promote = "gate"
) -> Artifact:
    """Evaluate the trained beside the untrained model, write the report, register the model, and
    let the gate decide whether it becomes champion.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
        promote: What happens to a better model. gate: it becomes champion; ask: once a person has
            said yes; never: it stays challenger.
    """
    if (answered := deciding.carry_out_answer(recipe, overrides, promote)) is not None:
        return answered
    with open_session("evaluate", recipe, overrides) as session:
        for model in session.graph.evaluate.inputs.values():
            if isinstance(model, Step) and model in session.graph.model_steps:
                session.require_finished(model, "train")
        registered = evaluate_and_register(session, session.graph)
    deciding.apply_decision(session.recipe.registry, session.store, registered, promote)
    return registered


def evaluate_and_register(session: RecipeSession, graph: Graph) -> Artifact:
    """The graph's evaluation and its registration with the gate's decision; returns that."""
    evaluated = session.make_step(graph.evaluate)
    publish_evaluation(evaluated, session.run.stage_url(graph.evaluate.address))
    return deciding.register_and_judge(session, graph)


@flow(name="retrain", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def retrain(
    recipe: RecipeName = "demo",
    overrides: Overrides = (),
    promote: deciding.Promote = "gate",
    min_new_rows: Annotated[int, Field(ge=1)] = 1,
    keep_rejected: bool = False,
    dry_run: bool = False,
) -> Artifact | None:
    """Look for new data; if there is any, download or adopt that alone, train on from the champion,
    compare, and let the gate decide. Nothing new: it ends, saying so.

    Args:
        recipe: Name of a recipe, or path of a .toml file.
        overrides: Changes to the recipe, each `table.key=value`.
        promote: What happens to a better model. gate: it becomes champion; ask: once a person has
            said yes; never: it stays challenger.
        min_new_rows: Fewer new rows than this wait for the next time.
        keep_rejected: Train on the data of rejected models again, instead of setting it aside.
        dry_run: Only say what is new.
    """
    if (answered := deciding.carry_out_answer(recipe, overrides, promote)) is not None:
        return answered
    wanted, profile, graph = load_graph(recipe, overrides)
    store = TrackingStore.at(profile.mlflow_uri, wanted.name)
    if graph.site.demo and not graph.site.demo.is_finished:
        with open_session("retrain", recipe, overrides) as session:
            session.make_step(graph.site.demo)
        graph = load_graph(recipe, overrides)[2]
    news = incremental.find_new_data(wanted, graph, store, keep_rejected)
    for line in incremental.describe_new_data(news, wanted):
        console.print(line, soft_wrap=True)
    if dry_run or news.is_nothing:
        _publish_news(wanted, news, "nothing was made")
        if not dry_run:
            _settle_last(wanted, store, news, promote)
        return None
    with open_session("retrain", recipe, overrides) as session:
        if news.last is None:
            prepare_data(session)
        else:
            steps = (incremental.new_merge_step, incremental.new_adopt_step)
            new = [step for declare in steps if (step := declare(wanted, graph, news))]
            begun = [*news.waiting, *map(session.make_step, new)]
            merges, adoptions = of_kind(MERGE, begun), of_kind(ADOPT, begun)
            site, rules = graph.site, wanted.verify
            adopted = [verify_step(site, rules, one, Role.ADOPT) for one in adoptions]
            samples = sum(int(session.make_step(step).counts["samples"]) for step in adopted)
            rows = rows_of(merges) + samples
            if rows < min_new_rows:
                few = f"{rows:,} new rows, {min_new_rows:,} are asked for: they wait"
                none = "nothing new: no row of the new files is new and within target_count"
                end = few if rows else none
                console.print(end)
                _publish_news(wanted, news, end)
                _settle_last(wanted, store, news, promote)
                return None
            parts = [data_steps(site, wanted, merge) for merge in merges if rows_of([merge])]
            parts += adopted
            champion = deciding.champion_beside(session, news.champion) if news.champion else None
            graph = incremental.draw_retraining(wanted, graph, news, [*news.used, *parts], champion)
            session.make_all(graph.data_steps)
        graph.require_samples()
        session.make_all(graph.model_steps)
        registered = evaluate_and_register(session, graph)
        _publish_news(wanted, news, read_decision(registered.folder).summary)
        publish_overview(session, graph)
    deciding.apply_decision(wanted.registry, store, registered, promote)
    return registered


def _settle_last(
    recipe: Recipe, store: TrackingStore, news: News, wanted: deciding.Promote
) -> None:
    """Carry out what the gate said of the last model, where a run was killed before it did."""
    if news.last is not None:
        deciding.apply_decision(recipe.registry, store, news.last.registered, wanted)


def _publish_news(recipe: Recipe, news: News, end: str) -> None:
    lines = "\n".join(incremental.describe_new_data(news, recipe))
    page = f"# Retraining of {recipe.registry.model_name}\n\n```\n{lines}\n```\n\n{end}\n"
    create_markdown_artifact(page, key="retraining")


@flow(name="takedown")
def takedown(file: Annotated[str, Field(min_length=1)]) -> list[str]:
    """Replace every dataset version that holds a sample named in a list; name the models.

    Args:
        file: Path of a text file, as the worker sees it: URLs, uids or SHA-256s, one a line.
    """
    root = load_profile().root.resolve()
    done = take_down(Path(file), root)
    lines = [line for one in done for line in describe_replacement(one, root)]
    lines = lines or ["no dataset version holds any of these samples"]
    said = "\n".join([*lines, *describe_unmatched(Path(file), root)])
    create_markdown_artifact(f"# Takedown of `{file}`\n\n```\n{said}\n```", key="takedown")
    return [one.new.digest for one in done]


@flow(name="score", on_crashed=[close_tracking], on_cancellation=[close_tracking])
def score(
    models: Models,
    recipe: ScoredRecipe = "",
    sets: tuple[str, ...] = (),
    data: str = FOLDER,
    overrides: Overrides = (),
) -> Artifact:
    """Evaluate models side by side, the first one as the subject, and write the report.

    Args:
        models: Each a saved model's folder, WEIGHTS:ARCHITECTURE, open_clip:NAME/WEIGHTS,
            transformers:FOLDER, or models:/NAME@ALIAS of the registry; NAME=... before it names it.
        recipe: Recipe whose sets are taken; leave it out and name sets instead.
        sets: Sets of the registry, folders of your own in `data`, paths, or NAME=FOLDER; `paper`
            for all 33.
        data: Folder that holds the sets.
        overrides: Changes to the recipe, each `table.key=value`; with `sets`, to `evaluate`.
    """
    profile = load_profile()
    root = profile.root.resolve()
    asked = read_asked(models, recipe, sets, data, overrides, root)
    specs = {name: fetch_model(spec, profile) for name, spec in asked.models.items()}
    step = asked.make_step(root, specs)
    params = {"flow": "score", "models": " ".join(models), "recipe": recipe}
    named = f"score {', '.join(specs)}"
    with track_run(profile, EXPERIMENT, named, step.digest, params) as run:
        made = Session(profile, run).make_step(step)
        publish_evaluation(made, run.stage_url(step.address, step.title))
    return made
