"""Start and stop the lasting servers of one machine: Prefect, MLflow, our search, and two workers.

Calling `up`, `down` or `status` twice is the same as calling it once; pid files, logs and the
secret that all servers ask for are in `<root>/services`. MLflow serves the same database and the
same files as `make demo` writes without a server, so that both see the same runs and models.
"""

import argparse
import base64
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

from dotenv import dotenv_values

INFRA = Path(__file__).resolve().parent
CHECKOUT = INFRA.parent
HOST = "127.0.0.1"
POOLS = ("cpu-io", "gpu")
START_S = 180
ANSWER_S = 60
STOP_S = 65  # a worker gives itself 60 s
SERVERS = {"prefect": (4200, "/api/health"), "mlflow": (5000, "/health")}  # port, page
SERVERS["search"] = (4300, "/health")


class UserError(Exception):
    """One sentence for the person at the terminal."""


class Service:
    """A server of this machine, known by its pid file."""

    def __init__(self, name, folder, command, settings, url="", health=""):
        self.name, self.url, self._health = name, url, health
        self.log, self._pid_file = folder / f"{name}.log", folder / f"{name}.json"
        self._command, self._settings = command, settings

    def noted(self):
        """`pid` and `url` of its process, if that is still the one that was started; else {}."""
        try:
            noted = json.loads(self._pid_file.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return noted if started_at(noted["pid"]) == noted["started"] else {}

    def pid(self):
        return self.noted().get("pid")

    def check_port(self):
        port = int(self.url.rpartition(":")[2])
        if self.pid():
            return
        try:
            socket.create_server((HOST, port)).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {port}, which {self.name} needs, cannot be opened ({error}): stop the "
                f"program that has it, or choose another port with --{self.name}-port"
            ) from None

    def up(self):
        if self.pid():
            self._await_health()
            say(f"{self.name:13} is up already {self.url}")
            return
        with self.log.open("ab") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            process = subprocess.Popen(
                self._command, cwd=CHECKOUT, env=self._settings, start_new_session=True, **streams
            )
        noted = {"pid": process.pid, "started": started_at(process.pid), "url": self.url}
        beside = self._pid_file.with_suffix(".new")
        beside.write_text(json.dumps(noted) + "\n")
        beside.replace(self._pid_file)
        self._await_health(process)
        say(f"{self.name:13} is up {self.url}")

    def _await_health(self, process=None):
        deadline = time.monotonic() + START_S
        while self._health and not self._is_answering():
            if process and process.poll() is not None:
                raise UserError(f"{self.name} ended while it started: {self.log} says why")
            if time.monotonic() > deadline:
                raise UserError(f"{self.name} did not answer within {START_S} s: see {self.log}")
            time.sleep(0.3)

    def _is_answering(self):
        url = self.url + self._health
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=3) as answer:
            return answer.status == 200

    def down(self):
        pid = self.pid()
        if pid is None:
            self._pid_file.unlink(missing_ok=True)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while started_at(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        for left in (remaining := [*session_of(pid), pid]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        while any(map(started_at, remaining)) and time.monotonic() < deadline + STOP_S:
            time.sleep(0.05)  # a killed process is gone only when the kernel has cleared it away
        self._pid_file.unlink(missing_ok=True)
        say(f"{self.name:13} is down")


def services(options):
    """(settings of the workers; the servers and the workers), as up.toml has them."""
    if "://" in options.root:
        raise UserError(
            f"EVACLIP_ROOT is {options.root}, and the servers of `make up` keep their databases in "
            "a folder: give one by --root, or run servers of their own (docs/team.md)"
        )
    root = Path(options.root).resolve()
    folder = root / "services"
    folder.mkdir(parents=True, exist_ok=True)
    secret = secret_in(folder / "prefect-auth")
    user, _, password = secret.partition(":")
    values = {
        **{"root": root, "here": os.getcwd(), "folder": folder},
        **{"secret": secret, "user": user, "password": password},
        "folder_in_ini": str(folder).replace("%", "%%"),
        "artifacts": (root / "mlflow-artifacts").as_uri(),
        "python_path": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
    }
    for name in SERVERS:
        values[f"{name}_port"] = port = getattr(options, f"{name}_port")
        values[name] = f"http://{HOST}:{port}"
    tables = tomllib.loads((INFRA / "up.toml").read_text())
    filled = {
        table: {name: text.format_map(values) for name, text in tables[table].items()}
        for table in ("defaults", "settings", *SERVERS, "files")
    }
    (folder / "mlflow-auth.ini").write_text(filled["files"]["mlflow-auth"])
    settings = {**filled["defaults"], **os.environ, **filled["settings"]}
    found = []
    for name, (_, health) in SERVERS.items():
        command = [part.format_map(values) for part in tables["commands"][name].split()]
        own = {**settings, **filled[name]}
        if name == "prefect":  # it would take this for somebody else's server
            del own["PREFECT_API_URL"]
        run = [sys.executable, "-m", *command]
        found.append(Service(name, folder, run, own, values[name], health))
    for pool in POOLS:
        run = [sys.executable, str(INFRA / "worker.py"), pool]
        found.append(Service(f"worker-{pool}", folder, run, settings))
    return settings, found


def secret_in(path):
    """The user and password that the Prefect server asks for; made where there is none, and linked
    into its place when on the disk: an empty file would be a server without a secret."""
    if not path.exists():
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                file.write(f"evaclip:{secrets.token_urlsafe(32)}")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # made by another `up` meanwhile
                os.link(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    return path.read_text()


def up(options):
    settings, (prefect, mlflow, search, *workers) = services(options)
    for start in (Service.check_port, Service.up):
        for server in (prefect, mlflow, search):
            start(server)
    # A page of ours, among those that the server lays out when it starts.
    shutil.copy(INFRA / "open.html", Path(prefect.log.parent, "prefect-ui", "v1"))
    secret = settings["PREFECT_API_AUTH_STRING"]
    if not any(worker.pid() for worker in workers):
        crash_runs(f"{prefect.url}/api", secret)
    apply(settings, prefect.log.with_name("apply.log"))
    for worker in workers:
        worker.up()
    await_deployments(prefect.url, secret)
    link = f"{prefect.url}/open.html#{basic(secret)}"
    say(f"\nstart a run: {link}, 'pipeline', Run (links for you alone)")
    for what, page in pages_of_models(mlflow.url, secret):
        say(f"{what}: http://{secret}@{mlflow.url.removeprefix('http://')}/open#/{page}")
    say(f"search what is embedded: http://{secret}@{search.url.removeprefix('http://')}/open")
    say("stop all: make down")


def down(options):
    settings, (prefect, mlflow, *others) = services(options)
    for other in others:
        other.down()
    if prefect.pid():  # on the port that it was given, not on that of this command
        try:
            crash_runs(f"{prefect.noted()['url']}/api", settings["PREFECT_API_AUTH_STRING"])
        except UserError as error:
            say(f"runs that are under way are not marked as crashed: {error}")
    mlflow.down()
    prefect.down()


def crash_runs(api, secret, **chosen):
    """Mark unfinished runs, all or those of a filter, as crashed: their worker is gone, and Prefect
    shows them as running for ever, with their place under the concurrency limit."""
    chosen["state"] = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
    state = {"type": "CRASHED", "message": "its worker was stopped; run it again to go on"}
    for run in ask(f"{api}/flow_runs/filter", secret, {"flow_runs": chosen}):
        if run["deployment_id"]:
            url = f"{api}/flow_runs/{run['id']}/set_state"
            ask(url, secret, {"state": state, "force": True})


def await_deployments(prefect, secret):
    """Wait until the server has heard of the workers: before that, every deployment looks lame."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        found = ask(f"{prefect}/api/deployments/filter", secret, {})
        if all(one["status"] == "READY" for one in found if one["work_pool_name"] in POOLS):
            return
        time.sleep(0.5)
    raise UserError(f"deployments were not ready within {START_S} s: see the workers' logs")


def pages_of_models(mlflow, secret):
    """(what it is, its address behind the #) of every champion's page and of each recipe's runs."""
    api = f"{mlflow}/api/2.0/mlflow"
    models = ask(f"{api}/registered-models/search?max_results=100", secret)
    for model in models.get("registered_models", []):
        for alias in model.get("aliases", []):
            page = f"models/{quote(model['name'], safe='')}/versions/{alias['version']}"
            yield f"{model['name']}@{alias['alias']}", page
    found = ask(f"{api}/experiments/search", secret, {"max_results": 100})
    for one in found.get("experiments", []):
        if one["name"] not in ("Default", "doctor"):
            page = f"experiments/{one['experiment_id']}/runs?workflowType=machine_learning"
            yield f"runs of {one['name']}", page


def basic(secret):
    return base64.b64encode(secret.encode()).decode()


def ask(url, secret, body=None):
    """Return what a server of ours answers: to a POST, or to a GET without a body."""
    headers = {"Content-Type": "application/json"}
    if secret:
        headers["Authorization"] = f"Basic {basic(secret)}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S / 2) as answer:
                return json.load(answer)
        except OSError as error:
            if getattr(error, "code", 503) != 503 or time.monotonic() > deadline:
                raise UserError(f"the server gives no answer to {url}: {error}") from None
            time.sleep(1)  # it starts, or its database is busy (503)


def status(options):
    _, found = services(options)
    for service in found:
        state = f"up, pid {service.pid()}" if service.pid() else "down"
        say(f"{service.name:13} {state:16} {service.url}  log {service.log}")


def apply(settings, log):
    """Work pools, deployments and automations, as the files here have them."""
    command = [sys.executable, str(INFRA / "apply.py")]
    with log.open("ab") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        done = subprocess.run(command, cwd=CHECKOUT, env=settings, **streams)
    if done.returncode:
        raise UserError(f"the server does not take deployments or automations: {log} says why")


def started_at(pid):
    """Return when a process started, in the kernel's ticks: a pid alone may be another program's by
    now. None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def session_of(leader):
    """Every process of a session; Prefect's worker is in that of worker.py, in its own group."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(path.name)) == leader:
                yield int(path.name)


def say(line):
    """Print a line, without control characters: names of models are anybody's."""
    sys.stdout.write(re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", "?", line) + "\n")
    sys.stdout.flush()


def main(arguments=None):
    # Started with `&` from a script, this process ignores SIGINT and its children would inherit
    # that; Prefect's worker turns SIGTERM into SIGINT, so it could never be stopped.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in dotenv_values(".env").items():  # the flows' command line reads it, too
        if name.startswith("EVACLIP_") and value is not None:
            os.environ.setdefault(name, value)
    commands = {"up": up, "down": down, "status": status}
    parser = argparse.ArgumentParser(prog="infra/up.py", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=commands)
    parser.add_argument("--root", default=os.environ.get("EVACLIP_ROOT", "runs"))
    for name, (port, _) in SERVERS.items():
        default = os.environ.get(f"EVACLIP_{name.upper()}_PORT", str(port))
        parser.add_argument(f"--{name}-port", type=int, default=default)
    options = parser.parse_args(arguments)
    try:
        commands[options.what](options)
    except (UserError, PermissionError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
