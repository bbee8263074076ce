"""A better model waits for a person: the run is suspended, its process ends, the answer counts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.runner import Runner
from prefect.testing.utilities import prefect_test_harness

from flows.promotion.promotion_events import EVENT
from tasks.artifacts.artifact import Address, Artifact, Made, Stage, produce_artifact
from tasks.register.config import REGISTERED, RegisterConfig
from tasks.register.gate import Candidate, Champion, decide_promotion
from tasks.register.promotion import (
    carry_out,
    champion_of,
    history,
    promote_version,
    read_decision,
    standing_of,
    write_decision,
)
from tasks.tracking import TrackingStore
from tests.flows.approving import approving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ENTRYPOINT = f"{Path(__file__).with_name('approving.py')}:approving"


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@dataclass(frozen=True)
class Registry:
    """A registry whose champion is version 1, and registrations of the versions 2 and 3 that the
    gate would promote."""

    root: Path
    store: TrackingStore
    registered: tuple[Artifact, Artifact]

    @property
    def champion(self) -> int | None:
        found = champion_of(self.store, "clip", "champion")
        return found and found.version


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    store = TrackingStore.at(f"sqlite:///{tmp_path}/mlflow.db", "e")
    client = store.client()
    client.create_registered_model("clip")
    for number in (1, 2, 3):
        client.create_model_version("clip", source=f"file:///nothing/{number}")
    promote_version(store, "clip", "champion", 1, "gate", "gate", "no champion yet")
    first = decide_promotion(
        Candidate(weights="w", bytes=1, headlines=()), None, RegisterConfig(model_name="c").gate
    )
    champion = Champion(version=1, weights="w", bytes=1)
    better = first.model_copy(update={"champion": champion.version})

    def register(version: int) -> Artifact:
        def make(out: Path) -> Made:
            about = {"name": "clip", "version": version, "tracking_uri": store.uri}
            (out / REGISTERED).write_text(json.dumps(about))
            files = write_decision(store, "clip", version, better, out)
            return Made({"version": version}, (out / REGISTERED, *files))

        return produce_artifact(Address(tmp_path, Stage("register", 2), {"version": version}), make)

    return Registry(tmp_path, store, (register(2), register(3)))


def deployed_run(registry: Registry, registered: Artifact) -> UUID:
    """A run of the flow's deployment, not started."""
    with get_client(sync_client=True) as client:
        flow = client.create_flow(approving)
        deployment = client.create_deployment(flow, "asks", entrypoint=ENTRYPOINT, path="/")
        parameters = {"root": str(registry.root), "registered": str(registered.folder)}
        return client.create_flow_run_from_deployment(deployment, parameters=parameters).id


def execute(run: UUID) -> FlowRun:
    """Run it in a process of its own, as a worker does, until that ends."""
    asyncio.run(Runner().execute_flow_run(run, entrypoint=ENTRYPOINT))
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run)


def answer(run: UUID, **said: object) -> None:
    with get_client(sync_client=True) as client:
        client.resume_flow_run(run, run_input=said)


def promotions_told(count: int) -> list[dict[str, object]]:
    """Payloads of the events that an automation could have acted on, once there are so many.

    The server stores events some time after it got them.
    """
    wanted = {"filter": {"event": {"name": [EVENT]}}}
    until = time.monotonic() + 30
    while True:
        with get_client(sync_client=True) as client:
            found = client.request("POST", "/events/filter", json=wanted).json()["events"]
        if len(found) >= count or time.monotonic() > until:
            return [event["payload"] for event in found]
        time.sleep(0.2)


def test_a_better_model_waits_for_a_yes_and_a_no_is_kept(server: None, registry: Registry) -> None:
    second, third = registry.registered
    run = deployed_run(registry, second)
    waiting = execute(run)
    assert waiting.state is not None and waiting.state.name == "Suspended"
    assert registry.champion == 1
    answer(run, promote=True, by="Ada", why="it looks right")
    assert execute(run).state.is_completed()  # type: ignore[union-attr]
    assert registry.champion == 2
    last = history(registry.store, "clip", "champion")[-1]
    assert (last.version, last.how, last.by, last.why) == (2, "approval", "Ada", "it looks right")
    told = {"name": "clip", "version": 2, "before": 1, "alias": "champion"}
    assert promotions_told(1) == [told]

    promote_version(registry.store, "clip", "champion", 1, "rollback", "me", "")
    run = deployed_run(registry, third)
    execute(run)
    answer(run, promote=False, by="Ada", why="too slow")
    assert execute(run).state.is_completed()  # type: ignore[union-attr]
    assert registry.champion == 1
    assert standing_of(registry.store, "clip", 3).declined == "Ada: too slow"


def test_a_run_from_the_command_line_leaves_the_model_and_names_the_command(
    server: None, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    second, _ = registry.registered
    assert approving(str(registry.root), str(second.folder)) is False
    assert "python -m flows promote clip/2" in capsys.readouterr().out
    assert registry.champion == 1
    config = RegisterConfig(model_name="clip")
    assert carry_out(registry.store, config, 2, read_decision(second.folder))
