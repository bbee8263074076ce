"""Tracking and registry over HTTP: a real MLflow server, started after the first run."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from evaclip_model import create_model, open_model, save_model
from evaclip_model.ports import find_free_port
from tasks.artifacts.artifact import Address, Made, Stage, produce_artifact
from tasks.lineage.mlflow_store import Tracking
from tasks.register.config import RegisterConfig
from tasks.register.model_registry import pull_model, register_model
from tasks.tracking import TrackingStore
from tests.tasks.register.servers import mlflow_server

LOAD = """
    import importlib.util, sys
    assert importlib.util.find_spec("evaclip_model") is None
    import mlflow, pandas
    mlflow.set_tracking_uri(sys.argv[1])
    model = mlflow.pyfunc.load_model("models:/served@challenger", dst_path=sys.argv[2])
    example = model.input_example
    print(model.predict(example, params={"candidate_labels": ["a red square", "a dog"]}).label[0])
"""


def test_a_run_without_its_server_arrives_later_and_a_model_is_registered_loaded_and_pulled(
    tmp_path: Path,
) -> None:
    port = find_free_port()
    store = TrackingStore.at(f"http://127.0.0.1:{port}", "evaclip")
    tracking = Tracking(store, tmp_path / "journals", patience_s=60, system_every_s=0.2)
    root = tmp_path / "runs"
    address = Address(root, Stage("train", 1), {"seed": 0})

    def train(out: Path) -> Made:
        save_model(create_model("EVA02-CLIP-demo", seed=0), out / "model")
        return Made({}, (out / "model" / "config.json", out / "model" / "model.safetensors"))

    started = time.monotonic()
    with (
        tracking.pipeline_run("demo", "first") as pipeline,
        pipeline.stage_run(address) as stage,
        stage.follow_metrics(address.folder / "metrics.jsonl"),
    ):
        address.folder.mkdir(parents=True)
        line = json.dumps({"step": 0, "time": 1.0, "loss": 4.0})
        (address.folder / "metrics.jsonl").write_text(line + "\n")
        trained = produce_artifact(address, train)
        assert pipeline.run_id(wait_s=0.1) is None
    assert time.monotonic() - started < 30

    evaluated = produce_artifact(
        Address(root, Stage("evaluate", 1), {}, {"train": trained.digest}), lambda out: Made({}, ())
    )
    with mlflow_server(tmp_path / "server", port):
        with tracking.pipeline_run("demo", "second") as pipeline, pipeline.stage_run(address):
            assert pipeline.run_id(wait_s=30)
            url = pipeline.url()
        client = store.client()
        runs = client.search_runs([store.experiment_id(client)], "attributes.run_name = 'train'")
        made = next(run for run in runs if run.data.tags["evaclip.reused"] == "false")
        assert (made.info.status, made.data.metrics["loss"]) == ("FINISHED", 4.0)
        assert url is not None and url.startswith(f"{store.uri}/#/experiments/")

        out = root / "register"
        out.mkdir()
        config = RegisterConfig(model_name="served")
        register_model(config, trained, evaluated, store, root, out, run_id=made.info.run_id)
        version = client.get_model_version_by_alias("served", "challenger")
        assert (version.status, version.run_id) == ("READY", made.info.run_id)
        open_model(pull_model(store.uri, "served@challenger", tmp_path / "pulled"))

        packages = next(path for path in sys.path if path.endswith("site-packages"))
        settings = {**os.environ, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}
        copy = tmp_path / "copy"
        copy.mkdir()
        done = subprocess.run(
            [sys.executable, "-S", "-c", textwrap.dedent(LOAD), store.uri, str(copy)],
            **{"cwd": tmp_path, "env": settings, "capture_output": True, "text": True},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().splitlines()[-1] in ("a red square", "a dog")
