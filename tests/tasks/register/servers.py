"""Real MLflow servers on loopback: one that tracks and registers, one that serves a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from evaclip_model.ports import find_free_port

START_S = 120
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextmanager
def mlflow_server(
    folder: Path,
    port: int,
    artifacts: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """A tracking server whose database is in `folder`; files there, too, or where `artifacts`,
    options of its command, say."""
    folder.mkdir(exist_ok=True)
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
        *(artifacts or ("--artifacts-destination", str(folder / "files"))),
    ]
    with _running(command, {**os.environ, **QUIET, **(settings or {})}, folder / "log", port):
        yield


@contextmanager
def model_server(
    folder: Path, tracking_uri: str, model: str, python: str = sys.executable
) -> Iterator[str]:
    """`mlflow models serve` in an environment, the tests' own by default; yields the address of
    its answers."""
    port = find_free_port()
    command = [
        *(python, "-m", "mlflow", "models", "serve", "-m", model),
        *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
    ]
    # It starts uvicorn by its name.
    path = f"{Path(python).parent}:{os.environ['PATH']}"
    settings = {**os.environ, **QUIET, "MLFLOW_TRACKING_URI": tracking_uri, "PATH": path}
    with _running(command, settings, folder / "serving.log", port):
        yield f"http://127.0.0.1:{port}/invocations"


@contextmanager
def _running(
    command: list[str], settings: Mapping[str, str], log: Path, port: int
) -> Iterator[None]:
    with log.open("w") as file:
        server = subprocess.Popen(
            command, env=settings, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while not _answers(port):
            assert time.monotonic() < deadline and server.poll() is None, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
