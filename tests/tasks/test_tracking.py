import http.server
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evaclip_model import InputError
from tasks.tracking import TrackingStore

OPEN = "from tasks.tracking import TrackingStore as S; import sys; S.at(sys.argv[1], 'e').client()"


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_database_whose_maker_is_killed_can_be_opened_by_the_next(
    tmp_path: Path, share: float
) -> None:
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    whole = time.monotonic()
    subprocess.run([sys.executable, "-c", OPEN, f"{uri}.whole"], check=True)
    whole = time.monotonic() - whole
    maker = subprocess.Popen([sys.executable, "-c", OPEN, uri])
    time.sleep(whole * share)
    os.kill(maker.pid, signal.SIGKILL)
    maker.wait()
    store = TrackingStore.at(uri, "e")
    assert store.experiment_id(store.client())


def test_two_makers_leave_one_database_and_nothing_beside_it(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    makers = [subprocess.Popen([sys.executable, "-c", OPEN, uri]) for _ in range(2)]
    assert [maker.wait() for maker in makers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_does_not_know_the_user_is_not_called_away(status: int) -> None:
    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with http.server.HTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = TrackingStore.at(f"http://127.0.0.1:{server.server_port}", "e")
        with (
            pytest.raises(InputError, match=r"does not let this user in.*MLFLOW_TRACKING_PASSWORD"),
            store.connect() as client,
        ):
            client.get_registered_model("clip")
        server.shutdown()


def test_what_a_database_refuses_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = TrackingStore.at(f"sqlite:///{tmp_path}/mlflow.db", "demo")
    client = store.client()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("DROP TABLE experiments")
    with pytest.raises(InputError, match="no such table: experiments"), store.connect():
        client.get_experiment_by_name("demo")
    assert capfd.readouterr().err == ""
