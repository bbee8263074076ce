"""Deployments and automations as files: entry points, forms and triggers, without a server."""

from __future__ import annotations

import asyncio
import http.server
import importlib
import importlib.util
import re
import subprocess
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore
from prefect.utilities.callables import parameter_schema

INFRA = Path(__file__).parents[2] / "infra"
KUBERNETES = INFRA / "kubernetes"
DEPLOYMENTS = yaml.safe_load((INFRA / "prefect.yaml").read_text())
BY_NAME = {one["name"]: one for one in DEPLOYMENTS["deployments"]}


@pytest.fixture(scope="module")
def apply() -> ModuleType:
    spec = importlib.util.spec_from_file_location("infra_apply", INFRA / "apply.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def form(name: str) -> dict[str, Any]:
    module, _, flow = BY_NAME[name]["entrypoint"].rpartition(".")
    return parameter_schema(getattr(importlib.import_module(module), flow)).model_dump()


def test_every_way_to_use_the_system_is_a_deployment_in_a_pool_that_there_is(
    apply: ModuleType,
) -> None:
    assert set(BY_NAME) == {
        *("pipeline", "prepare", "train", "evaluate", "score", "retrain", "takedown")
    }
    assert len(BY_NAME) == len(DEPLOYMENTS["deployments"]), "a name stands twice"
    assert DEPLOYMENTS["pull"] == []
    assert {one["work_pool"]["name"] for one in BY_NAME.values()} == set(apply.LIMITS)
    assert BY_NAME["retrain"]["concurrency_limit"]["collision_strategy"] == "CANCEL_NEW"


@pytest.mark.parametrize("name", BY_NAME)
def test_a_form_is_flat_described_and_accepts_what_the_deployment_gives(name: str) -> None:
    schema = form(name)
    assert schema["definitions"] == {}
    for field, shown in schema["properties"].items():
        assert shown.get("description"), field
        assert shown.get("type") in ("string", "integer", "boolean", "array"), field
    given = BY_NAME[name].get("parameters", {})
    jsonschema.validate(given, {**schema, "required": list(given)})


@pytest.mark.parametrize(
    ("overrides", "taken"),
    [
        (
            ["train.stage1.lr_vision=1e-3", "merge.sources.laion2b.files=s3://bucket/a.parquet"],
            True,
        ),
        (["register.model_name=me@home", "train.stage1.seed="], True),
        (["lr"], False),
        (["=3"], False),
        (["merge.sources.a.files=https://me:secret@host/x.parquet"], False),
    ],
)
def test_changes_are_settings_and_hold_no_password(overrides: list[str], taken: bool) -> None:
    validator = jsonschema.Draft202012Validator(form("pipeline"))
    assert validator.is_valid({"overrides": overrides}) is taken


def test_automations_are_what_prefect_takes_and_wait_for_their_webhook(apply: ModuleType) -> None:
    webhooks = set()
    for one in yaml.safe_load((INFRA / "automations.yaml").read_text())["automations"]:
        without = [
            apply.with_block(action, dict.fromkeys(apply.WEBHOOKS)) for action in one["actions"]
        ]
        webhooks |= {action["block"] for action in one["actions"] if "block" in action}
        assert (None in without) == any("block" in action for action in one["actions"])
        blocks = dict.fromkeys(apply.WEBHOOKS, "0a1b2c3d-0000-4000-8000-000000000000")
        actions = [apply.with_block(action, blocks) for action in one["actions"]]
        AutomationCore.model_validate({**one, "actions": actions})
    assert webhooks == set(apply.WEBHOOKS)


def test_a_webhook_may_be_private_is_never_shown_and_follows_no_redirect(apply: ModuleType) -> None:
    asked: list[str] = []

    class Redirecting(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Redirecting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/hook?token=very-secret"
        hook = apply.make_webhook("EVACLIP_ALERT_WEBHOOK", address)
        answer = asyncio.run(hook.call("{}"))
        server.shutdown()
    assert (answer.status_code, asked) == (307, ["/hook?token=very-secret"])
    assert "very-secret" not in f"{hook!r} {hook.model_dump_json()}"
    with pytest.raises(SystemExit, match=r"EVACLIP_ALERT_WEBHOOK must be an address [^/]*http://"):
        apply.make_webhook("EVACLIP_ALERT_WEBHOOK", "hooks.example/very-secret")


def test_every_manifest_names_the_image_that_is_built_and_ranks_get_the_key_of_storage() -> None:
    built = set(re.findall(r"--tag (evaclip:\S+)", (INFRA / "Dockerfile").read_text()))
    files = [*KUBERNETES.glob("*.yaml"), INFRA / "work-pools" / "kubernetes.json"]
    used = {image for file in files for image in re.findall(r"evaclip:[\w.]+", file.read_text())}
    assert used == built and len(built) == 1
    for name in ("train-job.yaml", "train-jobset.yaml", "training-runtime.yaml"):
        assert "key: AWS_SECRET_ACCESS_KEY" in (KUBERNETES / name).read_text()


def test_settings_with_secrets_are_not_committed() -> None:
    ignored = ["git", "check-ignore", ".env", "infra/secrets/postgres"]
    done = subprocess.run(ignored, cwd=INFRA.parent, capture_output=True, text=True)
    assert done.stdout.split() == ignored[2:]
