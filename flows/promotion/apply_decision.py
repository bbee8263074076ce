"""From an evaluated model to its place in the registry: compared, judged, registered, promoted.

Covers: comparing with the champion, the gate's decision as an artifact, approval by a person, the
event of a promotion.
Not here: the rules (tasks/register/gate.py), moving aliases (tasks/register/promotion.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from prefect import runtime
from prefect.artifacts import create_markdown_artifact
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from evaclip_model.training.config import METRICS_FILE, MODEL_FOLDER
from evaclip_model.weights.checkpoint_files import WEIGHTS_FILE
from flows.console.terminal import console
from flows.graph.runner import Session
from flows.promotion.compare_models import measure
from flows.promotion.promotion_events import announce
from flows.reporting.lineage_artifact import publish_lineage
from tasks.artifacts.artifact import MANIFEST, Address, Artifact, sha256_of
from tasks.evaluate.config import RESULTS
from tasks.evaluate.config import STAGE as EVALUATE
from tasks.evaluate.metrics.metric import judged_metrics
from tasks.register.config import DECISION, DECISION_PAGE, REGISTERED, RegisterConfig
from tasks.register.gate import (
    Candidate,
    Champion,
    Decision,
    contaminated_in,
    decide,
    gains_in,
)
from tasks.register.model_registry import forget_if_gone
from tasks.register.promotion import (
    Standing,
    carry_out,
    champion_of,
    decline,
    is_due,
    is_stale,
    promote,
    read_decision,
)
from tasks.register.pull_model import pull
from tasks.register.task import register
from tasks.tracking import TrackingStore
from tasks.train.config import STAGE as TRAIN

Promote = Literal["gate", "never", "ask"]
"""What happens to a better model: it becomes champion, it stays challenger, a person is asked."""
PULLED = "pulled"
"""Folder under the root for champions that were trained elsewhere."""
APPROVAL_WAIT_S = 7 * 24 * 3600
TRAINED, CHAMPION = "trained", "champion"
"""What the two models are called in a comparison."""


class Approval(RunInput):
    """What a person says to a better model."""

    promote: bool = Field(default=False, description="Whether it becomes champion.")
    by: str = Field(min_length=1, description="Who you are; it is kept with the version.")
    why: str = Field(default="", description="Why; it is kept with the version.")


def register_and_judge(
    session: Session, address: Address, trained: Artifact, evaluated: Artifact
) -> Artifact:
    """Register `trained` as a candidate, with the gate's decision on it beside; move nothing.

    The champion is among `evaluated`'s models, or is compared with `trained` now.

    Raises:
        InputError: the registry does not answer.
    """
    config, store = session.recipe.registry, session.store
    forget_if_gone(address, store)
    _forget_if_stale(session, address)
    if address.is_finished:
        decision = read_decision(address.folder)
    else:
        champion = champion_of(store, config.model_name, config.alias)
        decision = _judge(session, trained, evaluated, champion)
    registered = session.make(
        *(register, address, config, trained, evaluated, decision),
        *(store, session.root, session.run.run_id(), session.profile.large_weights),
        attach=(DECISION, DECISION_PAGE),
    )
    page = (registered.folder / DECISION_PAGE).read_text()
    create_markdown_artifact(page, key="promotion")
    publish_lineage(session, registered)
    console.print(f"  gate      {decision.summary}", soft_wrap=True, markup=False)
    return registered


def settle(
    config: RegisterConfig, store: TrackingStore, registered: Artifact, wanted: Promote
) -> bool:
    """Carry out the gate's decision on a registration as far as `wanted` lets it, asking a person
    where one shall be asked; whether the version became champion now.

    Called by the flow that is not called by another, behind its session: a run that is suspended
    leaves it here, and comes by again when it is resumed.

    Raises:
        InputError: the registry does not answer.
    """
    decision = read_decision(registered.folder)
    version = int(registered.counts["version"])
    if wanted == "never" or not is_due(store, config, version, decision):
        return False
    if wanted == "ask" or config.gate.approval:
        moved = _ask(config, store, registered, version, decision)
    else:
        moved = carry_out(store, config, version, decision)
    if moved:
        announce(config.model_name, version, decision.champion, config.alias)
    return moved


def champions_folder(session: Session, champion: Standing) -> Path:
    """Folder of the champion's model: where it was trained, or a copy from the registry.

    Raises:
        InputError: the registry does not answer.
    """
    if champion.digest:
        here = session.root / TRAIN.name / champion.digest / MODEL_FOLDER
        weights = here / WEIGHTS_FILE
        if weights.is_file() and sha256_of(weights) == champion.weights:
            return here
    name = session.recipe.registry.model_name
    copy = session.root / PULLED / (champion.weights[:16] or f"{name}-{champion.version}")
    if not (copy / WEIGHTS_FILE).is_file():
        pull(session.store.uri, f"{name}/{champion.version}", copy)
    return copy


def _forget_if_stale(session: Session, address: Address) -> None:
    """Unfinish a registration whose promotion was never carried out and is out of date."""
    if not address.is_finished:
        return
    config = session.recipe.registry
    version = json.loads((address.folder / REGISTERED).read_text())["version"]
    if is_stale(session.store, config, version, read_decision(address.folder)):
        (address.folder / MANIFEST).unlink()


def _judge(
    session: Session, trained: Artifact, evaluated: Artifact, standing: Standing | None
) -> Decision:
    policy = session.recipe.registry.gate
    folders = {TRAINED: trained.folder / MODEL_FOLDER}
    weights = {TRAINED: sha256_of(folders[TRAINED] / WEIGHTS_FILE)}
    results = _results(evaluated)
    if standing is not None:
        folders[CHAMPION] = champions_folder(session, standing)
        weights[CHAMPION] = standing.weights or sha256_of(folders[CHAMPION] / WEIGHTS_FILE)
        if weights[CHAMPION] != weights[TRAINED] and CHAMPION not in results["models"]:
            results = _compared(session, trained, folders, weights[CHAMPION])
    times: Mapping[str, float] = {}
    if policy.max_latency_ratio is not None and standing is not None:
        from tasks.register.latency import latencies_ms  # imports torch, for few policies only

        times = latencies_ms(folders)
    candidate = Candidate(
        weights=weights[TRAINED],
        bytes=_size(folders[TRAINED]),
        latency_ms=times.get(TRAINED),
        gains=gains_in(results, CHAMPION),
        headlines=judged_metrics(),
        failed=results.get("failed", {}),
        contaminated=contaminated_in(results),
    )
    if standing is None:
        return decide(candidate, None, policy)
    champion = Champion(
        version=standing.version,
        weights=weights[CHAMPION],
        bytes=_size(folders[CHAMPION]),
        latency_ms=times.get(CHAMPION),
    )
    return decide(candidate, champion, policy)


def _compared(
    session: Session, trained: Artifact, folders: Mapping[str, Path], champion: str
) -> dict[str, Any]:
    """Results of the trained model beside the champion, on the recipe's sets."""
    chart, config = session.chart, session.recipe.evaluate
    marks = {one.name: chart.evaluate.parents[one.name] for one in config.sets}
    parents = {"train": trained.digest, CHAMPION: champion[:16], **marks}
    address = Address.of(session.root, EVALUATE, config, parents)
    curves = [trained.folder / METRICS_FILE]
    return _results(measure(session, address, folders, curves, chart.dataset, title="compare"))


def _results(evaluated: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((evaluated.folder / RESULTS).read_text())
    return found


def _size(folder: Path) -> int:
    return (folder / WEIGHTS_FILE).stat().st_size


def _ask(
    config: RegisterConfig,
    store: TrackingStore,
    registered: Artifact,
    version: int,
    decision: Decision,
) -> bool:
    """Suspend the run until a person has said yes or no; a run that cannot be resumed from the UI
    leaves the version as it is."""
    name = config.model_name
    if runtime.deployment.id is None:
        command = f"python -m flows promote {name}/{version}"
        console.print(f"  gate      waits for a yes: {command}", soft_wrap=True, markup=False)
        return False
    page = (registered.folder / DECISION_PAGE).read_text()
    form = Approval.with_initial_data(description=page, promote=False)
    answer = suspend_flow_run(
        wait_for_input=form, timeout=APPROVAL_WAIT_S, key=f"approve-{name}-{version}"
    )
    if not answer.promote:
        decline(store, name, version, answer.by, answer.why)
        return False
    why = answer.why or decision.summary
    return promote(store, name, config.alias, version, "approval", answer.by, why)
