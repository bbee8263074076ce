"""From an evaluated model to its place in the registry: compared, judged, registered, promoted.

All of it raises InputError where the registry does not answer.
Not here: the rules (tasks/register/gate.py), moving aliases (tasks/register/promotion.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from prefect import runtime
from prefect.artifacts import create_markdown_artifact
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.input.actions import filter_flow_run_input
from pydantic import Field

from evaclip_model.training.config import MODEL_FOLDER
from evaclip_model.weights.checkpoint_files import WEIGHTS_FILE
from flows.config.profile import Profile, load_profile
from flows.config.recipe import load_recipe
from flows.graph.graph import CHAMPION, TRAINED, Beside, Graph, comparison_step
from flows.graph.runner import RecipeSession
from flows.graph.step import finished_artifact
from flows.promotion.promotion_events import announce_promotion
from flows.reporting.prefect_artifacts import publish_lineage
from flows.reporting.terminal import console
from tasks.artifacts import artifact as stored
from tasks.artifacts.root_store import fetch_artifact, withdraw_manifest
from tasks.evaluate.config import RESULTS
from tasks.evaluate.metrics.metric import judged_metrics
from tasks.progress import Report
from tasks.register import gate, promotion
from tasks.register.config import DECISION_PAGE, REGISTERED, STAGE as REGISTER, RegisterConfig
from tasks.register.model_registry import forget_if_gone, pull_model, register_model
from tasks.register.promotion import Waiting, read_decision
from tasks.tracking import TrackingStore
from tasks.train.config import STAGE as TRAIN

Promote = Literal["gate", "never", "ask"]
"""What happens to a better model: it becomes champion, it stays challenger, a person is asked."""
PULLED = "pulled"  # folder under the root for champions that were trained elsewhere
APPROVAL_WAIT_S = 7 * 24 * 3600


class Approval(RunInput):
    """A person's answer to a better model."""

    promote: bool = Field(default=False, description="Whether it becomes champion.")
    by: str = Field(min_length=1, description="Who you are; it is kept with the version.")
    why: str = Field(default="", description="Why; it is kept with the version.")


def register_and_judge(session: RecipeSession, graph: Graph) -> stored.Artifact:
    """Register the graph's trained model with the gate's decision on it, but move nothing. The
    champion is among the models of the graph's evaluation, or is compared with now."""
    step, config, store = graph.register, session.recipe.registry, session.store
    forget_if_gone(step.address, store)
    if step.is_finished:
        decision = read_decision(step.folder)
        registered_as = json.loads((step.folder / REGISTERED).read_text())["version"]
        if promotion.waits_for(store, config, registered_as, decision) is Waiting.STALE:
            withdraw_manifest(step.folder)
    if not step.is_finished:
        decision = _judge_candidate(
            session, graph, promotion.require_champion(store, config.model_name, config.alias)
        )
    trained, evaluated = finished_artifact(graph.final), finished_artifact(graph.evaluate)

    def register(profile: Profile, out: Path, report: Report) -> stored.Made:
        run, large = session.run.run_id(), profile.large_weights
        made = register_model(
            config, trained, evaluated, store, session.root, out, run, report, large
        )
        version = int(made.counts["version"])
        files = promotion.write_decision(store, config.model_name, version, decision, out)
        return stored.Made(made.counts, (*made.files, *files))

    registered = session.make_step(replace(step, work=register))
    page = (registered.folder / DECISION_PAGE).read_text()
    create_markdown_artifact(page, key="promotion")
    publish_lineage(session, registered)
    console.print(f"  gate      {decision.summary}", soft_wrap=True)
    return registered


def apply_decision(
    config: RegisterConfig, store: TrackingStore, registered: stored.Artifact, wanted: Promote
) -> bool:
    """Carry out the gate's decision on a registration as far as `wanted` lets it, asking a person
    where one shall be asked; returns whether the version became champion now. Called behind the
    flow's session: a suspended run leaves it here, and comes by again when it is resumed."""
    decision = read_decision(registered.folder)
    version = int(registered.counts["version"])
    waits = promotion.waits_for(store, config, version, decision)
    if wanted == "never" or waits is not Waiting.DUE:
        return False
    if wanted == "ask" or config.gate.approval:
        moved = _ask_person(config, store, registered.folder / DECISION_PAGE, version, decision)
    else:
        moved = promotion.carry_out(store, config, version, decision)
    if moved:
        announce_promotion(config.model_name, version, decision.champion, config.alias)
    return moved


def carry_out_answer(
    recipe: str, overrides: Sequence[str], wanted: Promote
) -> stored.Artifact | None:
    """Carry out what a person answered to this flow run before it was resumed, or say why not;
    returns the registration asked about, None where nothing was asked. A flow calls it before all
    else and ends with it: by now its recipe may have new data, and so another model."""
    if runtime.flow_run.id is None:
        return None
    resolved, profile = load_recipe(recipe, overrides), load_profile()
    config, store = resolved.registry, TrackingStore.at(profile.mlflow_uri, resolved.name)
    asked = f"suspended-{_approval_key(config, '')}"
    given: Any = filter_flow_run_input(asked, limit=50)
    answers, name = {one.key.removeprefix(asked): one.value for one in given}, config.model_name
    for registered in reversed(stored.read_artifacts(profile.root.resolve()) if answers else []):
        version = int(registered.counts.get("version", 0))
        said = answers.get(f"{version}-response")
        made = (registered.kind, registered.config.get("model_name"))
        if said is None or made != (REGISTER.name, name):
            continue
        moved = apply_decision(config, store, registered, wanted)
        decision, answer = read_decision(registered.folder), json.loads(said)
        if not moved and promotion.waits_for(store, config, version, decision) is Waiting.STALE:
            if not answer["promote"]:
                promotion.decline_version(store, name, version, answer["by"], answer.get("why", ""))
            console.print(
                f"  gate      {answer['by']}'s answer on {name}/{version} moves nothing: "
                f"{config.alias} is another version by now, which it was not compared with",
                soft_wrap=True,
            )
        return registered
    return None


def _approval_key(config: RegisterConfig, version: int | str) -> str:
    return f"approve-{config.model_name}-{version}"


def champion_beside(session: RecipeSession, champion: promotion.Standing) -> Beside:
    """The champion to evaluate another one beside: where it was trained, or a registry's copy."""
    folder = session.root / TRAIN.name / champion.digest
    folder = fetch_artifact(folder, MODEL_FOLDER) / MODEL_FOLDER
    weights = folder / WEIGHTS_FILE
    if not (
        champion.digest and weights.is_file() and stored.sha256_of(weights) == champion.weights
    ):
        name = session.recipe.registry.model_name
        named = champion.weights[: stored.DIGEST_CHARS] or f"{name}-{champion.version}"
        folder = session.root / PULLED / named
        if not (folder / WEIGHTS_FILE).is_file():
            model, places = f"{name}/{champion.version}", load_profile().weight_places
            pull_model(session.store.uri, model, folder, places=places)
    mark = champion.weights or stored.sha256_of(folder / WEIGHTS_FILE)
    return Beside(CHAMPION, stored.Role.CHAMPION, mark[: stored.DIGEST_CHARS], folder)


def _judge_candidate(
    session: RecipeSession, graph: Graph, standing: promotion.Standing | None
) -> gate.Decision:
    policy, champion = session.recipe.registry.gate, None
    folders = {TRAINED: fetch_artifact(graph.final.folder) / MODEL_FOLDER}
    weights = {TRAINED: stored.sha256_of(folders[TRAINED] / WEIGHTS_FILE)}
    results = json.loads((graph.evaluate.folder / RESULTS).read_text())
    if standing is not None:
        beside = champion_beside(session, standing)
        folders[CHAMPION] = beside.folder
        weights[CHAMPION] = standing.weights or stored.sha256_of(beside.folder / WEIGHTS_FILE)
        if weights[CHAMPION] != weights[TRAINED] and CHAMPION not in results["models"]:
            step = comparison_step(
                *(graph.site, session.recipe.evaluate, graph.train, graph.final, graph.dataset),
                *(beside, "compare"),
            )
            results = json.loads((session.make_step(step).folder / RESULTS).read_text())
    times: Mapping[str, float] = {}
    if policy.max_latency_ratio is not None and standing is not None:
        from tasks.register.latency import latencies_ms  # imports torch, for few policies only

        times = latencies_ms(folders)
    measured: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        size, latency_ms = (folder / WEIGHTS_FILE).stat().st_size, times.get(name)
        measured[name] = {"weights": weights[name], "bytes": size, "latency_ms": latency_ms}
    candidate = gate.Candidate(
        **measured[TRAINED],
        gains=gate.gains_in(results, CHAMPION),
        headlines=judged_metrics(),
        failed=results.get("failed", {}),
        contaminated=gate.contaminated_in(results),
    )
    if standing is not None:
        champion = gate.Champion(version=standing.version, **measured[CHAMPION])
    return gate.decide_promotion(candidate, champion, policy)


def _ask_person(
    config: RegisterConfig, store: TrackingStore, page: Path, version: int, decision: gate.Decision
) -> bool:
    """Suspend the run until a person has answered, if it can be resumed from the UI."""
    name = config.model_name
    if runtime.deployment.id is None:
        command = f"python -m flows promote {name}/{version}"
        console.print(f"  gate      waits for a yes: {command}", soft_wrap=True)
        return False
    form = Approval.with_initial_data(description=page.read_text(), promote=False)
    answer = suspend_flow_run(
        wait_for_input=form, timeout=APPROVAL_WAIT_S, key=_approval_key(config, version)
    )
    if not answer.promote:
        promotion.decline_version(store, name, version, answer.by, answer.why)
        return False
    why = answer.why or decision.summary
    return promotion.promote_version(store, name, config.alias, version, "approval", answer.by, why)
