"""A week in an operator's life with `make up`: a person's schedule and yes, new data, a colleague
who deletes things, a machine that is lost, a move to a larger disk. Then the lineage is right.
"""

from __future__ import annotations

import http.server
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.register.promotion import history, read_decision
from tests.flows.command import run
from tests.flows.test_retrain import FIRST, RECIPE, Web, make_web
from tests.infra.test_stack import Heard, Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
LONG_S = 1200
ENDED = ("Completed", "Failed", "Crashed", "Cancelled")


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Web:
    made = make_web(tmp_path)
    small = RECIPE.replace("9_600", "1_920").replace("4_800", "960")
    Path(made.recipe).write_text(small.format(port=made.port, folder=made.folder))
    monkeypatch.setenv("EVACLIP_ROOT", str(made.root))
    return made


@pytest.fixture
def stack(web: Web) -> Iterator[Any]:
    webhook: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Heard)
    webhook.heard = []
    threading.Thread(target=webhook.serve_forever, daemon=True).start()
    made: Any = Stack(web.root, webhook)  # type: ignore[no-untyped-call]
    try:
        made.make("up")
        yield made
    finally:
        made.make("down")
        webhook.shutdown()


def state_message(stack: Any, flow_run: str) -> str:
    return str(stack.ask(f"flow_runs/{flow_run}", method="GET")["state"]["message"])


def lose_machine(stack: Any, flow_run: str) -> None:
    """Kill the worker and the run's process while it is Pending, as a power cut does."""
    deadline = time.monotonic() + 120
    while (state := stack.ask(f"flow_runs/{flow_run}", method="GET")["state"]["name"]) != "Pending":
        assert state in ("Scheduled", "Late") and time.monotonic() < deadline, state
        time.sleep(0.02)
    supervisor = psutil.Process(stack.worker("gpu"))
    lost = [supervisor, *supervisor.children(recursive=True)]
    own = [one for one in stack.processes() if one.environ().get("PREFECT__FLOW_RUN_ID")]
    for process in [*lost, *own]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def test_after_a_week_with_colleagues_everything_is_there_and_nothing_was_promoted_unseen(
    web: Web, stack: Any
) -> None:
    # Monday: the operator sets the scheduled recipe, and the first model waits for a yes.
    retrain = stack.deployments()["retrain"]
    (schedule,) = retrain["schedules"]
    mine = {"active": True, "schedule": {"cron": "30 2 * * 0", "timezone": "Europe/Berlin"}}
    stack.ask(f"deployments/{retrain['id']}/schedules/{schedule['id']}", mine, "PATCH")
    stack.ask(f"deployments/{retrain['id']}", {"parameters": {"recipe": web.recipe}}, "PATCH")
    web.publish("1", [web.row(concept) for concept in web.concepts[:FIRST]])
    asking = stack.start("retrain", {"recipe": web.recipe, "promote": "ask"})
    assert stack.becomes(asking, "Suspended", *ENDED, within_s=LONG_S) == "Suspended"
    assert web.champion() is None

    # Tuesday: new data arrives, a colleague deletes the experiment, then somebody says yes.
    web.publish("2", [web.row(concept) for concept in web.concepts[FIRST:]])
    client = web.store.client()
    experiment = client.get_experiment_by_name("weekly").experiment_id
    client.delete_experiment(experiment)
    yes = {"promote": True, "by": "Ada", "why": "it looks right"}
    stack.ask(f"flow_runs/{asking}/resume", {"run_input": yes})
    assert stack.becomes(asking, *ENDED, within_s=LONG_S) == "Completed"
    (move,) = history(web.store, "weekly", "champion")
    assert (move.version, move.how, move.by, move.why) == (1, "approval", "Ada", "it looks right")
    assert len(web.made("train")) == 1, "the answer came before the new data"

    # Wednesday: a machine is lost before a run began; the alias is deleted in MLflow's page.
    lost = stack.start("score", {})
    lose_machine(stack, lost)
    stack.make("up")
    client.delete_registered_model_alias("weekly", "champion")
    assert stack.becomes(lost, *ENDED, within_s=400) == "Crashed"
    refused = stack.start("retrain", {"recipe": web.recipe})
    assert stack.becomes(refused, *ENDED, within_s=LONG_S) == "Failed"
    assert "promote weekly/1" in state_message(stack, refused)
    assert len(web.made("train")) == 1 and web.champion() is None
    tracking = {"EVACLIP_TRACKING_URI": web.store.uri}
    back = run(["promote", "weekly/1", "--reason", "it was deleted"], web.root, **tracking)
    assert back.status == 0, back.errors

    # Thursday: everything moves to a larger disk, a link stays; Friday: the second week is trained.
    stack.make("down")
    larger = web.folder / "larger" / "runs"
    larger.parent.mkdir()
    shutil.move(web.root, larger)
    web.root.symlink_to(larger)
    stack.make("up")
    kept = stack.deployments()["retrain"]
    assert kept["parameters"] == {"recipe": web.recipe}
    assert kept["schedules"][0]["active"]
    assert mine["schedule"].items() <= kept["schedules"][0]["schedule"].items()  # type: ignore[attr-defined]
    second = stack.start("retrain", {})
    assert stack.becomes(second, *ENDED, within_s=LONG_S) == "Completed"
    decision = read_decision(web.made("register")[-1].folder)
    assert decision.champion == 1, "no promotion without comparison"
    assert web.champion() == (2 if decision.outcome == "promote" else 1)
    assert len(web.made("download")) == 2 and len(web.made("train")) == 2
    assert web.made("train")[1].parents["start_from"] == web.made("train")[0].digest

    # Sunday: what the second model was made from, and that no run of the week is open or missing.
    for journal in larger.glob("tracking/*"):
        assert (journal / "shipped").exists(), journal
    client = web.store.client()
    assert client.get_experiment(experiment).lifecycle_stage == "active"
    found = client.search_runs([experiment])
    assert {one.info.status for one in found} <= {"FINISHED", "FAILED"}
    trained = [one for one in found if one.data.tags.get("evaclip.stage") == "train"]
    assert sum("final_loss" in one.data.metrics for one in trained) == 2
    tree = run(["lineage", "models:/weekly/2"], web.root).output
    for kind in ("merge", "download", "verify", "dataset", "train"):
        for artifact in web.made(kind):
            assert artifact.digest[:8] in tree, (kind, tree)
    assert run(["pull", "weekly/2", str(web.folder / "pulled")], web.root).status == 0
