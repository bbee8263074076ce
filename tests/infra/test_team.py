"""The servers of a team as compose.yaml has them, but without containers: PostgreSQL under both,
passwords on both, files and checkpoints on S3; and the whole pipeline through them."""

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from evaclip_model.ports import find_free_port
from tests.flows.command import environment, run, small_demo
from tests.infra.servers import listens, postgres, running, s3

ADMIN, SECRET = "admin", "a-password-of-the-test"
ACCESS_KEY = "evaclip"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def ask(url, user=None):
    request = urllib.request.Request(url)
    if user:
        word = base64.b64encode(f"{user}:{SECRET}".encode()).decode()
        request.add_header("Authorization", f"Basic {word}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def refused(url):
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(url)
    return error.value.code


class Team:
    def __init__(self, root, database, store):
        self.root, self.database, self.store = root, database, store
        self.prefect = f"http://127.0.0.1:{find_free_port()}/api"
        self.mlflow = f"http://127.0.0.1:{find_free_port()}"

    @property
    def settings(self):
        """What a client of all servers has in its environment."""
        return {
            "PREFECT_API_URL": self.prefect,
            "PREFECT_API_AUTH_STRING": f"{ADMIN}:{SECRET}",
            "EVACLIP_TRACKING_URI": self.mlflow,
            "EVACLIP_CHECKPOINT_URL": "s3://evaclip/checkpoints",
            "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": SECRET,
            "MLFLOW_S3_ENDPOINT_URL": self.store,
            "AWS_ENDPOINT_URL": self.store,
            "AWS_ACCESS_KEY_ID": os.environ.get("AWS_ACCESS_KEY_ID", ACCESS_KEY),
            "AWS_SECRET_ACCESS_KEY": os.environ.get("AWS_SECRET_ACCESS_KEY", SECRET),
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def files(self, prefix):
        """Keys of the bucket."""
        code = (
            "import boto3, json, sys; found = boto3.resource('s3').Bucket('evaclip').objects\n"
            "print(json.dumps([one.key for one in found.filter(Prefix=sys.argv[1])]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, prefix],
            env=environment(self.root, **self.settings),
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    def rows(self, database, question):
        """An answer of PostgreSQL's."""
        words = ["--host=127.0.0.1", f"--port={self.database}", "--username=evaclip"]
        done = subprocess.run(
            ["psql", *words, f"--dbname={database}", "--tuples-only", f"--command={question}"],
            env={**os.environ, "PGPASSWORD": SECRET},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The S3 server that is there, or one of its own."""
    if url := os.environ.get("EVACLIP_TEST_S3_URL"):
        yield url
        return
    with s3(tmp_path_factory.mktemp("s3") / "s3", ACCESS_KEY, SECRET) as url:
        yield url


@pytest.fixture(scope="module")
def team(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("team")
    databases = ("prefect", "mlflow", "mlflow_auth")
    with postgres(folder / "postgres", databases, SECRET) as port:
        made = Team(folder / "runs", port, store)
        at = f"evaclip@127.0.0.1:{port}"
        env = environment(made.root, PGPASSWORD=SECRET, **made.settings)
        bucket = [sys.executable, "infra/bucket.py", "evaclip"]
        for _ in range(2):
            subprocess.run(bucket, env=env, check=True)
        auth = folder / "auth.ini"
        ini = Path("infra/mlflow-auth.ini").read_text()
        auth.write_text(ini.replace("evaclip@postgres", at))
        server = {
            **{name: value for name, value in env.items() if name != "PREFECT_API_URL"},
            "DO_NOT_TRACK": "1",
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_API_AUTH_STRING": f"{ADMIN}:{SECRET}",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{at}/prefect",
            "MLFLOW_AUTH_ADMIN_PASSWORD": SECRET,
            "MLFLOW_AUTH_CONFIG_PATH": str(auth),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": SECRET,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        del server["EVACLIP_TRACKING_URI"], server["MLFLOW_TRACKING_PASSWORD"]
        ports = [int(url.split(":")[2].split("/")[0]) for url in (made.prefect, made.mlflow)]
        module = [sys.executable, "-m"]
        prefect = [*module, "prefect", "server", "start", "--host", "127.0.0.1"]
        mlflow = [
            *(*module, "mlflow", "server", "--app-name=basic-auth", "--host=127.0.0.1"),
            *(f"--port={ports[1]}", "--workers=1", "--no-serve-artifacts"),
            f"--backend-store-uri=postgresql://{at}/mlflow",
            "--default-artifact-root=s3://evaclip/mlflow",
        ]
        with (
            running(
                [*prefect, "--port", ports[0]],
                folder / "prefect.log",
                lambda: answers(f"{made.prefect}/ready"),
                env=server,
            ),
            running(
                mlflow,
                folder / "mlflow.log",
                lambda: listens(ports[1]) and answers(f"{made.mlflow}/health"),
                env=server,
            ),
        ):
            yield made


def answers(url):
    try:
        ask(url)
    except OSError:
        return False
    return True


def test_nobody_without_a_password_gets_an_answer_but_health_checks_do(team):
    assert refused(f"{team.prefect}/admin/version") == 401
    assert refused(f"{team.mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0") == 401
    assert ask(f"{team.prefect}/admin/version", ADMIN)
    assert ask(f"{team.mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0", ADMIN)
    assert ask(f"{team.mlflow}/health") == "OK"


def test_pools_deployments_and_automations_are_applied_to_it(team):
    env = environment(team.root, **team.settings, PYTHONPATH=os.getcwd())
    for _ in range(2):
        subprocess.run([sys.executable, "infra/apply.py"], env=env, check=True, capture_output=True)
    assert team.rows("prefect", "select count(*) from work_pool") == ["2"]
    assert team.rows("prefect", "select count(*) from automation") == ["2"], "without webhooks"


def test_the_doctor_finds_both_servers_well(team):
    ended = run(["doctor"], team.root, **team.settings)
    assert ended.status == 0, ended.output + ended.errors
    for what in ("Prefect", "MLflow", "tracking", "clock of Prefect", "clock of MLflow"):
        assert f"ok    {what}: " in ended.output, ended.output
    assert SECRET not in ended.output + ended.errors


def test_the_whole_pipeline_goes_through_them(team, monkeypatch):
    monkeypatch.setattr("tests.flows.command.TIMEOUT_S", 1200)
    demo = small_demo(team.root)
    often = ["train.stage1.checkpoint_every_steps=4"]  # by itself too small to save any
    ended = run(demo.arguments("run", "pipeline", also=often), team.root, **team.settings)
    assert ended.status == 0, ended.output[-3000:] + ended.errors[-3000:]
    assert "evaclip-demo" in ended.output
    assert team.rows("mlflow", "select count(*) from model_versions") == ["1"]
    states = team.rows("prefect", "select distinct state_type from flow_run")
    assert states == ["COMPLETED"], states
    assert [key for key in team.files("mlflow/") if key.endswith("model.safetensors")]
    assert [key for key in team.files("checkpoints/") if "/step-" in key]
    assert not list(team.root.glob("train/*/checkpoints/step-*"))
    logged = team.rows("mlflow", "select value from params union select value from tags")
    assert not any(SECRET in word for word in logged)
    assert SECRET not in ended.output + ended.errors
    print(f"pipeline over PostgreSQL and S3: {ended.seconds:.0f} s")
