"""Metrics that grow fast while the tracking server is killed and started again: none is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from mlflow import MlflowClient

from evaclip_model.config import Config
from evaclip_model.ports import find_free_port
from evaclip_model.training.config import JOB_FILE
from tasks.artifacts.artifact import Address, Stage
from tasks.lineage import shipper
from tasks.lineage.mlflow_store import Tracking
from tasks.tracking import TrackingStore

FIGURES = 30
LINES_A_SECOND = 10  # of a real training a hundred are sent in all
OUTAGE_S = float(os.environ.get("OUTAGE_S", "20"))
START_S = 120
STEPS = 1_000_000
PATIENCE_S = 60


class Empty(Config):
    pass


class Server:
    """`mlflow server` over one database, as often as it is started."""

    def __init__(self, folder):
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--no-serve-artifacts"]
        root = ["--default-artifact-root", f"{folder}/artifacts"]
        self._command = [sys.executable, "-m", "mlflow", "server", *where, *store, *root]
        self._log = folder / "server.log"
        self._env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

    def start(self):
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._env, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)

    def kill(self):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self):
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr(shipper, "LONGEST_BACKOFF_S", 4.0)
    monkeypatch.setattr(shipper, "PARTS", STEPS)  # of every step all is sent
    (tmp_path / "artifacts").mkdir()
    made = Server(tmp_path)
    made.start()
    yield made
    made.kill()


class Trainer(threading.Thread):
    """Writes lines as a trainer does, and remembers the longest that one took."""

    def __init__(self, file):
        super().__init__()
        self.file, self.stop, self.slowest_s, self.lines = file, threading.Event(), 0.0, 0

    def run(self):
        make_folder(self.file.parent)
        with self.file.open("w") as file:
            while not self.stop.wait(1 / LINES_A_SECOND):
                started = time.monotonic()
                self.lines += 1
                file.write(json.dumps(line(self.lines)) + "\n")
                file.flush()
                self.slowest_s = max(self.slowest_s, time.monotonic() - started)


def make_folder(folder):
    """The folder of a training of very many steps."""
    folder.mkdir(parents=True)
    settings = {"samples_seen": STEPS, "global_batch": 1}
    (folder / JOB_FILE).write_text(json.dumps({"train": settings}))


def line(step):
    return {"step": step, "time": 1.7e9 + step, **{f"f{n}": step + n for n in range(FIGURES)}}


def assert_all_there_once(server, file, lines):
    client = MlflowClient(tracking_uri=server.url)
    experiment = client.get_experiment_by_name("outage").experiment_id
    (run,) = client.search_runs([experiment], "tags.`evaclip.stage` = 'train'")
    assert run.info.status == "FINISHED"
    for number in range(FIGURES):
        points = client.get_metric_history(run.info.run_id, f"f{number}")
        assert sorted(point.step for point in points) == list(range(1, lines + 1))
        assert all(point.value == point.step + number for point in points)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("back", ["during the run", "after the run"])
def test_every_point_is_there_once_after_the_server_was_away(tmp_path, server, back):
    store = TrackingStore.at(server.url, "outage")
    address = Address.of(tmp_path / "runs", Stage("train", 1), Empty())
    trainer = Trainer(address.folder / "metrics.jsonl")
    tracking = Tracking(store, tmp_path / "journals", patience_s=PATIENCE_S, system_every_s=1)
    with tracking.pipeline_run("train", "digest") as pipeline:
        assert pipeline.run_id(60)
        with pipeline.stage_run(address) as stage, stage.follow_metrics(trainer.file):
            trainer.start()
            time.sleep(4)
            server.kill()
            time.sleep(OUTAGE_S)
            if back == "during the run":
                server.start()
                time.sleep(8)
            trainer.stop.set()
            trainer.join()
            left_at = time.monotonic()
    waited_s = time.monotonic() - left_at

    assert trainer.slowest_s < 1, "the trainer never waits for the server"
    assert waited_s < PATIENCE_S + 10
    if back == "after the run":
        server.start()
        with Tracking(store, tmp_path / "journals", patience_s=120).pipeline_run("next", "other"):
            pass
    assert_all_there_once(server, trainer.file, trainer.lines)
    print(f"{trainer.lines} lines, {trainer.lines * FIGURES} points, end waited {waited_s:.1f} s")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_backlog_of_a_whole_run_is_shipped_in_minutes(tmp_path, server):
    lines = int(os.environ.get("BACKLOG_LINES", "1000"))
    address = Address.of(tmp_path / "runs", Stage("train", 1), Empty())
    file = address.folder / "metrics.jsonl"
    make_folder(file.parent)
    file.write_text("".join(json.dumps(line(step)) + "\n" for step in range(1, lines + 1)))
    store = TrackingStore.at(server.url, "outage")
    started = time.monotonic()
    with (
        Tracking(store, tmp_path / "journals", patience_s=800).pipeline_run("train", "d") as run,
        run.stage_run(address) as stage,
        stage.follow_metrics(file),
    ):
        pass
    seconds = time.monotonic() - started
    assert_all_there_once(server, file, lines)
    print(f"{lines * FIGURES} points in {seconds:.1f} s: {lines * FIGURES / seconds:,.0f} a second")
