"""A Prefect server for the time of one command, when none is configured.

Prefect would start its own as a plain child, which survives a killed parent. This one runs under
the supervisor, ends with the command, however that ends, and answers nobody else.
"""

import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.ports import find_free_port
from tasks.process.child import start_supervised

START_TIMEOUT_S = 120


@contextmanager
def temporary_server(root: Path) -> Iterator[None]:
    """Serve the Prefect API, unless PREFECT_API_URL names a server. Enter it before prefect is
    imported, which reads its settings then."""
    quiet = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # infra/automations.yaml counts on it
        "PREFECT_HOME": str((root / "prefect").resolve()),
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    port, secret = find_free_port(), f"evaclip:{secrets.token_urlsafe(32)}"
    log = root / "prefect" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"),
        *("--host", "127.0.0.1", "--port", str(port), "--log-level", "error"),
    ]
    address = f"http://127.0.0.1:{port}/api"
    settings = {
        **os.environ,
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        # A web page or another user of this machine reaches loopback, too.
        "PREFECT_SERVER_API_AUTH_STRING": secret,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": address.removesuffix("/api"),
    }
    with start_supervised(command, log=log, grace_s=5, env=settings) as process:
        _wait_until_healthy(f"{address}/health", process, log)
        mine = {"PREFECT_API_URL": address, "PREFECT_API_AUTH_STRING": secret}
        before = {name: os.environ[name] for name in mine if name in os.environ}
        os.environ.update(mine)
        try:
            yield
        finally:
            for name in mine:
                del os.environ[name]
            os.environ.update(before)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    failed = "ended" if process.poll() is not None else f"gave no answer in {START_TIMEOUT_S} s"
    raise InputError(f"the temporary Prefect server {failed} while it started: {log} says why")
