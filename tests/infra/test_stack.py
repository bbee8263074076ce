"""`make up` for real: what the server then knows, refuses and does, and what `make down` leaves."""

import base64
import http.server
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from evaclip_model.ports import find_free_port
from tests.flows.command import environment

UP = Path(__file__).parents[2] / "infra" / "up.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Heard(http.server.BaseHTTPRequestHandler):
    """Keeps what a webhook is told."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append(json.loads(body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        """Quiet."""


class Stack:
    """The servers of one root."""

    def __init__(self, root, webhook):
        self.root, self.webhook = root, webhook
        self._ports = {name: find_free_port() for name in ("prefect", "mlflow", "search")}
        self.api = f"http://127.0.0.1:{self._ports['prefect']}/api"

    def make(self, what):
        address = f"http://127.0.0.1:{self.webhook.server_port}/hook?token=very-secret"
        hooks = {"EVACLIP_ALERT_WEBHOOK": address, "EVACLIP_PROMOTED_WEBHOOK": address}
        settings = environment(self.root, **hooks)
        ports = [word for name, port in self._ports.items() for word in (f"--{name}-port", port)]
        words = [sys.executable, UP, what, "--root", self.root, *ports]
        ended = subprocess.run(list(map(str, words)), env=settings, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def headers(self):
        secret = (self.root / "services" / "prefect-auth").read_bytes()
        return {
            "Content-Type": "application/json",
            "Authorization": f"Basic {base64.b64encode(secret).decode()}",
        }

    def ask(self, path, body=None, method="POST"):
        data = None if method == "GET" else json.dumps({} if body is None else body).encode()
        request = urllib.request.Request(f"{self.api}/{path}", data, self.headers(), method=method)
        for left in reversed(range(30)):
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or not left:  # SQLite is busy; Prefect's clients ask again too
                    raise
                time.sleep(1)
        raise AssertionError("the last try returns or raises")

    def deployments(self):
        return {one["name"]: one for one in self.ask("deployments/filter")}

    def start(self, name, parameters):
        path = f"deployments/{self.deployments()[name]['id']}/create_flow_run"
        return self.ask(path, {"parameters": parameters})["id"]

    def refused(self, name, parameters):
        with pytest.raises(urllib.error.HTTPError) as error:
            self.start(name, parameters)
        return json.load(error.value)["detail"]

    def becomes(self, run, *states, within_s=240):
        deadline = time.monotonic() + within_s
        while (state := self.ask(f"flow_runs/{run}", method="GET")["state"]["name"]) not in states:
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        return state

    def told(self, key, about="", within_s=30):
        """The one message of the webhook that has this key, and this text in its value."""

        def messages():
            return [one for one in self.webhook.heard if key in one and about in str(one[key])]

        deadline = time.monotonic() + within_s
        while not (found := messages()):
            assert time.monotonic() < deadline, self.webhook.heard
            time.sleep(0.2)
        assert len(found) == 1, found
        return found[0]

    def worker(self, pool):
        return json.loads((self.root / "services" / f"worker-{pool}.json").read_text())["pid"]

    def processes(self):
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("EVACLIP_ROOT") == str(self.root):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    webhook = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Heard)
    webhook.heard = []
    threading.Thread(target=webhook.serve_forever, daemon=True).start()
    made = Stack(tmp_path_factory.mktemp("stack") / "runs", webhook)
    try:
        made.make("up")
        yield made
    finally:
        made.make("down")
        webhook.shutdown()
    assert made.processes() == []


class Endless:
    """A takedown that goes on until it is let go: among the artifacts is one whose manifest is a
    pipe, in which nobody writes."""

    def __init__(self, root, lists):
        self._pipe, self.file = root / "merge" / "endless" / "manifest.json", str(lists)
        self._pipe.parent.mkdir(parents=True)
        os.mkfifo(self._pipe)
        lists.write_text("0" * 64 + "\n")

    def let_go(self):
        if not self._pipe.exists():
            return
        try:
            pipe = os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads
            pipe = None
        shutil.rmtree(self._pipe.parent)
        if pipe is not None:
            manifest = {"kind": "merge", "version": 1, "digest": "endless", "created": "2026"}
            manifest |= {"config": {}, "parents": {}, "counts": {}, "files": {}}
            os.write(pipe, json.dumps(manifest).encode())
            os.close(pipe)


@pytest.fixture
def endless(stack, tmp_path):
    made = Endless(stack.root, tmp_path / "list.txt")
    yield made
    made.let_go()  # a run that still reads would keep its place from those of other tests


def test_up_twice_is_up_once(stack):
    def known():
        pools = [(p["name"], p["id"]) for p in stack.ask("work_pools/filter")]
        automations = [(a["name"], a["id"]) for a in stack.ask("automations/filter")]
        return pools, automations, sorted((n, d["id"]) for n, d in stack.deployments().items())

    before, pids = known(), {one.pid for one in stack.processes()}
    said = stack.make("up")
    assert known() == before and len(before[1]) == 4
    assert said.count("is up already") == 5
    assert pids <= {one.pid for one in stack.processes()}


def test_deployments_name_no_machine_and_pools_have_limits(stack):
    for one in stack.deployments().values():
        assert one["pull_steps"] == [] and one["path"] is None
        assert one["concurrency_limit"] == 1 or one["global_concurrency_limit"]["limit"] == 1
        shown = one["parameter_openapi_schema"]["properties"]
        assert all(field["description"] and "$ref" not in field for field in shown.values())
    limits = {pool["name"]: pool["concurrency_limit"] for pool in stack.ask("work_pools/filter")}
    assert limits == {"cpu-io": 4, "gpu": 1}


@pytest.mark.parametrize(
    ("name", "parameters", "field"),
    [
        ("pipeline", {"recipe": "dmeo"}, "recipe"),
        ("train", {"overrides": ["nonsense"]}, "overrides[0]"),
        ("pipeline", {"dry_run": "perhaps"}, "dry_run"),
        ("retrain", {"promote": "yes"}, "promote"),
        ("takedown", {}, "file"),
    ],
)
def test_a_wrong_value_is_refused_by_its_field_before_anything_starts(
    stack, name, parameters, field
):
    assert f"'{field}'" in stack.refused(name, parameters)


def test_relative_paths_start_where_up_was_typed(stack):
    pools = {pool["name"]: pool for pool in stack.ask("work_pools/filter")}
    for pool in ("cpu-io", "gpu"):
        variables = pools[pool]["base_job_template"]["variables"]["properties"]
        assert variables["working_dir"]["default"] == os.getcwd()
    run = stack.start("takedown", {"file": "no-such-list.txt"})
    assert stack.becomes(run, "Completed", "Failed", "Crashed") == "Failed"


def test_what_a_person_set_stays_after_the_next_up(stack):
    retrain = stack.deployments()["retrain"]
    (schedule,) = retrain["schedules"]
    assert not schedule["active"] and schedule["schedule"]["cron"] == "0 3 * * 1"
    recipe = {"recipe": "/data/team/our.toml"}
    when = {"cron": "30 2 * * 0", "timezone": "Europe/Berlin"}
    path = f"deployments/{retrain['id']}"
    stack.ask(path, {"parameters": recipe}, "PATCH")
    mine = {"active": True, "schedule": when, "parameters": recipe}
    stack.ask(f"{path}/schedules/{schedule['id']}", mine, "PATCH")
    stack.make("up")
    retrain = stack.deployments()["retrain"]
    assert retrain["parameters"] == recipe
    (schedule,) = retrain["schedules"]
    assert schedule["active"] and schedule["parameters"] == recipe
    assert when.items() <= schedule["schedule"].items()


def test_a_page_of_another_site_and_another_user_get_nothing(stack):
    url = f"{stack.api}/deployments/filter"
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        request = urllib.request.Request(url, b"{}", {"Content-Type": "application/json"} | headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 401
        assert refused.value.headers.get("Access-Control-Allow-Origin") is None
    secret = stack.root / "services" / "prefect-auth"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    opened = f"{stack.api.removesuffix('/api')}/open.html"
    with urllib.request.urlopen(opened, timeout=30) as page:
        served = page.read().decode()
    assert "prefect-password" in served and secret.read_text() not in served


def test_a_failed_run_is_reported_and_the_address_of_the_report_is_not_shown(stack):
    run = stack.start("takedown", {"file": "/nowhere/list.txt"})
    assert stack.becomes(run, "Completed", "Failed", "Crashed") == "Failed"
    assert "of takedown is Failed" in stack.told("text", about="/nowhere/list.txt")["text"]
    shown = json.dumps(stack.ask("block_documents/filter"))
    assert "alert" in shown and "very-secret" not in shown
    assert "very-secret" not in json.dumps(stack.ask("automations/filter"))


def test_serving_hears_of_a_promoted_model(stack):
    request = urllib.request.Request(
        f"{stack.api}/events",
        json.dumps(
            [
                {
                    "id": str(uuid.uuid4()),
                    "occurred": datetime.now(UTC).isoformat(),
                    "event": "evaclip.model.promoted",
                    "resource": {"prefect.resource.id": "evaclip.model.evaclip-demo"},
                    "payload": {"version": "7"},
                }
            ]
        ).encode(),
        stack.headers(),
    )
    urllib.request.urlopen(request, timeout=30).close()
    told = stack.told("event")
    assert told["resource"]["prefect.resource.id"] == "evaclip.model.evaclip-demo"
    assert told["payload"] == {"version": "7"}


def test_a_run_whose_machine_is_gone_crashes_without_anybody(stack, endless):
    run = stack.start("takedown", {"file": endless.file})
    stack.becomes(run, "Running")
    time.sleep(5)  # the first heartbeat
    supervisor = psutil.Process(stack.worker("cpu-io"))
    for process in [supervisor, *supervisor.children(recursive=True)]:
        process.kill()
    gone = time.monotonic()
    assert stack.becomes(run, "Completed", "Failed", "Crashed", within_s=200) == "Crashed"
    print(f"crashed {time.monotonic() - gone:.0f} s after its machine was gone")
    stack.make("up")


def test_a_stopped_worker_leaves_its_run_crashed_and_no_process(stack, endless):
    run = stack.start("takedown", {"file": endless.file})
    stack.becomes(run, "Running")
    os.kill(stack.worker("cpu-io"), signal.SIGTERM)
    assert stack.becomes(run, "Completed", "Failed", "Crashed", within_s=60) == "Crashed"
    here = [one for one in stack.processes() if one.environ().get("PREFECT__FLOW_RUN_ID") == run]
    assert here == []
    stack.make("up")


def test_a_killed_worker_is_replaced_and_its_run_goes_on(stack, endless):
    run = stack.start("takedown", {"file": endless.file})
    stack.becomes(run, "Running")
    (worker,) = [
        one
        for one in psutil.Process(stack.worker("cpu-io")).children()
        if "worker" in one.cmdline()
    ]
    worker.kill()
    time.sleep(15)
    assert stack.becomes(run, "Running") == "Running"
    endless.let_go()
    assert stack.becomes(run, "Completed", "Failed", "Crashed") == "Completed"
    assert psutil.Process(stack.worker("cpu-io")).children()


def test_a_second_run_waits_and_a_second_retraining_is_cancelled(stack, endless):
    first = stack.start("takedown", {"file": endless.file})
    stack.becomes(first, "Running")
    second = stack.start("takedown", {"file": "/nowhere/list.txt"})
    time.sleep(15)
    assert stack.becomes(second, "AwaitingConcurrencySlot", "Scheduled", "Late")
    endless.let_go()
    assert stack.becomes(second, "Completed", "Failed", "Crashed", within_s=120) == "Failed"
    options = stack.deployments()["retrain"]["concurrency_options"]
    assert options["collision_strategy"] == "CANCEL_NEW"
