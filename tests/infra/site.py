"""Servers and two workers as `make up` starts them, in a folder of their own."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from evaclip_model.ports import find_free_port
from tests.flows.command import CHECKOUT, environment

OVER = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass(frozen=True)
class Site:
    """Servers and workers, of `infra/up.py` where nothing else is said."""

    root: Path
    prefect_port: int
    mlflow_port: int
    search_port: int

    @property
    def prefect(self) -> str:
        return f"http://127.0.0.1:{self.prefect_port}"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    def command(self, what: str) -> None:
        """`infra/up.py up` or `down`."""
        ports = ["--prefect-port", str(self.prefect_port), "--mlflow-port", str(self.mlflow_port)]
        ports += ["--search-port", str(self.search_port)]
        subprocess.run(
            [sys.executable, "infra/up.py", what, "--root", str(self.root), *ports],
            cwd=CHECKOUT,
            env=environment(self.root),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def service(self, name: str) -> psutil.Process:
        """The process that `up` started under this name."""
        noted = json.loads((self.root / "services" / f"{name}.json").read_text())
        return psutil.Process(noted["pid"])

    def kill(self, name: str) -> None:
        """Kill -9 of a server with its children."""
        server = self.service(name)
        for process in [*server.children(recursive=True), server]:
            process.kill()

    @property
    def secret(self) -> str:
        """USER:PASSWORD of both servers."""
        return (self.root / "services" / "prefect-auth").read_text()

    @property
    def mlflow_secret(self) -> str:
        """USER:PASSWORD of MLflow."""
        return self.secret

    @property
    def link(self) -> str:
        """To Prefect's UI, with the secret."""
        return f"{self.prefect}/open.html#{base64.b64encode(self.secret.encode()).decode()}"

    def link_to_mlflow(self, page: str) -> str:
        """To a page of MLflow's UI, with the secret."""
        return f"http://{self.secret}@127.0.0.1:{self.mlflow_port}/open#/{page}"

    @property
    def search(self) -> str:
        return f"http://127.0.0.1:{self.search_port}"

    @property
    def link_to_search(self) -> str:
        """To the search page, with the secret."""
        return f"http://{self.secret}@127.0.0.1:{self.search_port}/open"

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Prefect's answer."""
        return _ask(f"{self.prefect}/api/{path}", body, self.secret)

    def ask_mlflow(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """MLflow's answer."""
        return _ask(f"{self.mlflow}/api/2.0/mlflow/{path}", body, self.mlflow_secret)

    def start(self, flow: str, overrides: Sequence[str]) -> str:
        """Id of a new run of the flow's deployment, with the demo's recipe."""
        deployment = self.ask(f"deployments/name/{flow}/{flow}")["id"]
        parameters = {"recipe": "demo", "overrides": list(overrides)}
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.ask(f"deployments/{deployment}/create_flow_run", body)["id"])

    def state(self, run_id: str) -> str:
        """Type of its state; "?" while the server is away."""
        try:
            return str(self.ask(f"flow_runs/{run_id}")["state"]["type"])
        except (urllib.error.URLError, OSError):
            return "?"

    def until_over(self, run_id: str, timeout_s: float) -> str:
        """The state it ends in, or is in when the time is over."""
        wait_for(lambda: self.state(run_id) in OVER, timeout_s)
        return self.state(run_id)


def _ask(url: str, body: Mapping[str, Any] | None, secret: str) -> Any:
    data = None if body is None else json.dumps(body).encode()
    basic = base64.b64encode(secret.encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {basic}"}
    request = urllib.request.Request(url, data, headers)
    for left in reversed(range(30)):
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 503 or not left:  # SQLite is busy; Prefect's clients ask again too
                raise
            time.sleep(1)
    raise AssertionError("the last try returns or raises")


@contextmanager
def serving(root: Path) -> Iterator[Site]:
    """Servers and workers, for the time of the block."""
    site = Site(root, find_free_port(), find_free_port(), find_free_port())
    try:
        site.command("up")
        yield site
    finally:
        site.command("down")


def wait_for(is_so: Callable[[], bool], timeout_s: float) -> bool:
    """Whether it became so in time."""
    until = time.monotonic() + timeout_s
    while not (so := is_so()) and time.monotonic() < until:
        time.sleep(0.2)
    return so
