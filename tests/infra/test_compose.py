"""The stack of infra/compose.yaml in containers, by the commands of docs/team.md as they stand
there: the demo's pipeline and a retraining through it, a stopped trainer, a backup that is
restored, and no secret in any log. PostgreSQL and S3 are images of our own (tests/infra/images).
"""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import shlex
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaclip_model.ports import find_free_port
from tests.flows.command import CHECKOUT, small_demo
from tests.infra.conftest import BASE, Docker
from tests.infra.site import Site, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
PAGE = (CHECKOUT / "docs/team.md").read_text()
LONG_S = 3600.0
FIRST = "merge.sources.laion2b.files=demo:metadata/laion2b/part-00000*.parquet"
"""The other file is what is new at the retraining."""


def commands(heading: str, number: int = 0) -> str:
    """A block of commands below a heading of the page."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[number]


@dataclass(frozen=True)
class Team(Site):
    """The stack, and everything that was to be read of it so far."""

    docker: Docker
    settings: dict[str, str]
    shown: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=lambda: [*small_demo(Path("/runs")).overrides])
    """Of one demo, whose world has one port."""

    def type(self, text: str, is_fine: bool = True) -> str:
        """What commands of the page say."""
        text = text.replace("COMPOSE_FILE=infra/compose.yaml", f"COMPOSE_FILE={self.files}")
        settings = {**self.settings, "COMPOSE_FILE": self.files}
        said = self.docker.shell(text, is_fine=is_fine, **settings)
        self.shown.append(said)
        return said

    @property
    def files(self) -> str:
        return "infra/compose.yaml:infra/compose.test.json"

    def secret_of(self, name: str) -> str:
        return (self.docker.checkout / "infra/secrets" / name).read_text()

    @property
    def secret(self) -> str:
        return self.secret_of("PREFECT_API_AUTH_STRING")

    @property
    def mlflow_secret(self) -> str:
        return f"admin:{self.secret_of('MLFLOW_AUTH_ADMIN_PASSWORD')}"

    @property
    def champion(self) -> str:
        found = self.ask_mlflow("registered-models/alias?name=evaclip-demo&alias=champion")
        return str(found["model_version"]["version"])

    def list(self, pattern: str) -> list[str]:
        """Files below the stack's root, with the time of their last change."""
        find = f"find /runs -path '/runs/{pattern}' -printf '%p %T@\\n'"
        return self.type(f'docker compose exec -T worker sh -c "{find}"').split("\n")[:-1]

    def start_as_the_page_does(self, flow: str, overrides: Sequence[str]) -> str:
        """Id of a new run."""
        (line,) = (
            one for one in commands("Bring it up", 1).splitlines() if f"{flow}/{flow}" in one
        )
        said = self.type(
            f"{line} --param {shlex.quote(f'overrides={json.dumps(list(overrides))}')}"
        )
        found = re.search(r"UUID: (\S+)", said)
        assert found, said
        return found[1]

    def retry(self, run: str) -> None:
        """As the button does."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
        self.ask(f"flow_runs/{run}/set_state", {"state": state, "force": True})

    def read_all(self) -> str:
        """Logs, settings and databases of every container, and every text below the root."""
        texts = "find /runs -type f -size -1000k ! -name '*.tar' -exec cat {} +"
        self.type("docker compose logs --no-color")
        self.type("docker inspect $(docker ps --all --quiet)")
        self.type("docker history --no-trunc evaclip:0.1.0")
        self.type(f"docker compose exec -T worker sh -c \"{texts}\" | tr -cd '[:print:]\\n'")
        for name in ("prefect", "mlflow"):
            self.type(f"docker compose exec -T postgres pg_dump --username=evaclip {name}")
        return "\n".join(self.shown)


@pytest.fixture(scope="module")
def team(docker: Docker, image: str) -> Iterator[Team]:
    images = docker.checkout / "tests/infra/images"
    shutil.copy(Path(sys.executable).with_name("weed"), images)
    for name in ("postgres", "s3"):
        words = ["--network=host", f"--build-arg=BASE={BASE}", f"--target={name}"]
        docker("build", *words, f"--tag=evaclip-{name}:test", str(images))
    names = ("EVACLIP_PREFECT_PORT", "EVACLIP_MLFLOW_PORT", "S3_PORT")
    ports = {name: find_free_port() for name in names}
    settings = {
        "POSTGRES_IMAGE": "evaclip-postgres:test",
        "SEAWEEDFS_IMAGE": "evaclip-s3:test",
        "PYTHON_IMAGE": BASE,
        "KUBECTL_IMAGE": BASE,
        "MLFLOW_PUBLIC_HOST": "mlflow.example.com",
        "PREFECT_PUBLIC_URL": "https://prefect.example.com",
        "PATH": f"{docker.folder}/bin:{os.environ['PATH']}",
        **{name: str(port) for name, port in ports.items()},
    }
    write_what_differs_here(docker)
    # No page of search in the stack: nothing is asked of that port.
    made = Team(Path("/runs"), ports[names[0]], ports[names[1]], 0, docker, settings)
    try:
        started = time.monotonic()
        said = made.type(commands("Bring it up"))
        print(f"stack: {time.monotonic() - started:.0f} s")
        assert "ok    Prefect: " in said and "ok    MLflow: " in said, said[-3000:]
        yield made
    finally:
        made.type("docker compose down --volumes", is_fine=False)


def write_what_differs_here(docker: Docker) -> None:
    """Limits that this machine allows, a network from which pip reaches its index, and the name
    `docker compose` for Debian's docker-compose, which knows no key `name`."""
    hard = {"memlock": resource.RLIMIT_MEMLOCK, "nofile": resource.RLIMIT_NOFILE}
    limits = {name: resource.getrlimit(kind)[1] for name, kind in hard.items()}
    services = {"trainer": {"ulimits": limits}, "prefect": {"build": {"network": "host"}}}
    (docker.checkout / "infra/compose.test.json").write_text(json.dumps({"services": services}))
    if "Docker Compose" in docker("compose", "version", is_fine=False):
        return
    (docker.folder / "bin").mkdir()
    program = docker.folder / "bin/docker"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = compose ] || exec {shutil.which("docker")} "$@"\n'
        'shift\nexec docker-compose --project-name evaclip "$@"\n'
    )
    program.chmod(0o755)
    compose = docker.checkout / "infra/compose.yaml"
    compose.write_text(compose.read_text().replace("name: evaclip\n", "", 1))


def refused(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, b"{}", headers), timeout=30):
            return 200
    except urllib.error.HTTPError as error:
        return error.code


def test_it_listens_on_loopback_alone_and_asks_everybody_for_a_password(team: Team) -> None:
    ports = re.findall(r"\S+->", team.docker("ps", "--format", "{{.Ports}}"))
    assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports), ports
    assert refused(f"{team.prefect}/api/deployments/filter") == 401
    assert refused(f"{team.mlflow}/api/2.0/mlflow/experiments/search") == 401
    assert {one["name"] for one in team.ask("work_pools/filter", {})} == {"cpu-io", "gpu"}
    assert len(team.ask("deployments/filter", {})) == 7


def test_prefects_pages_ask_the_server_by_the_name_that_browsers_know(team: Team) -> None:
    with urllib.request.urlopen(f"{team.prefect}/ui-settings", timeout=30) as answer:
        assert json.load(answer)["api_url"] == "https://prefect.example.com/api"
    with urllib.request.urlopen(f"{team.prefect}/", timeout=30) as page:
        assert page.headers["Content-Type"].startswith("text/html")


def test_mlflow_answers_under_the_name_of_the_proxy_and_to_its_own_pages_alone(team: Team) -> None:
    url = f"{team.mlflow}/api/2.0/mlflow/experiments/search"
    asked = {"Content-Type": "application/json", "Host": "mlflow.example.com"}
    assert refused(url, **asked, Origin="https://mlflow.example.com") == 401  # by its password
    assert refused(url, **asked, Origin="https://evil.example") == 403
    assert refused(url, **{**asked, "Host": "evil.example"}) == 403


def test_a_trainer_that_is_stopped_and_started_goes_on_to_the_champion(team: Team) -> None:
    run = team.start_as_the_page_does("pipeline", [*team.overrides, FIRST])
    assert wait_for(lambda: bool(team.list("train/*/metrics.jsonl")), LONG_S), team.state(run)
    done = team.list("*/manifest.json")
    team.type("docker compose stop trainer")
    assert team.until_over(run, 120) == "CRASHED"
    team.type("docker compose start trainer")
    team.retry(run)
    assert wait_for(lambda: team.state(run) == "RUNNING", 120)
    assert team.until_over(run, LONG_S) == "COMPLETED"
    assert len(done) > 4 and set(done) <= set(team.list("*/manifest.json")), "made once"
    assert team.champion == "1"


def test_a_retraining_takes_what_is_new_and_registers_its_model(team: Team) -> None:
    started = time.monotonic()
    more = "merge.sources.laion2b.target_count=600"  # 400 of them are there
    run = team.start_as_the_page_does("retrain", [*team.overrides, more])
    assert team.until_over(run, LONG_S) == "COMPLETED"
    assert len(team.list("download/*/manifest.json")) == 2
    print(f"retraining through the deployment: {time.monotonic() - started:.0f} s")
    assert len(versions(team)) == 2


def versions(team: Team) -> list[Any]:
    found = team.ask_mlflow("model-versions/search?filter=name%3D%27evaclip-demo%27")
    return list(found["model_versions"])


def test_no_secret_stands_in_a_log_a_setting_a_database_or_a_file(team: Team) -> None:
    shown = team.read_all()
    assert "evaclip-demo" in shown
    names = ("POSTGRES_PASSWORD", "AWS_SECRET_ACCESS_KEY", "MLFLOW_FLASK_SERVER_SECRET_KEY")
    logins = (team.secret, team.mlflow_secret)
    forms = [*map(team.secret_of, names), *(one.partition(":")[2] for one in logins)]
    forms += [base64.b64encode(one.encode()).decode() for one in logins]
    assert [one for one in forms if one in shown] == []


def test_what_was_backed_up_is_there_again_after_everything_was_removed(team: Team) -> None:
    secret, champion, before = team.secret, team.champion, versions(team)
    deployments = team.ask("deployments/filter", {})
    team.type(commands("Back up"))
    team.type("docker compose down --volumes")
    shutil.rmtree(team.docker.checkout / "infra/secrets")
    said = team.type(commands("Restore"))
    assert "ok    MLflow: " in said, said[-3000:]
    assert team.secret == secret and team.champion == champion
    assert versions(team) == before
    ids = {one["id"] for one in team.ask("deployments/filter", {})}
    assert ids == {one["id"] for one in deployments}
    pull = f"python -m flows pull evaclip-demo/{champion} /tmp/pulled"
    assert "/tmp/pulled" in team.type(f"docker compose run --rm --no-deps worker {pull}")
    score = team.start("score", team.overrides)
    assert team.until_over(score, LONG_S) == "COMPLETED"


def test_an_upgrade_keeps_what_is_there(team: Team) -> None:
    before = versions(team)
    team.type(commands("Upgrade"))
    assert versions(team) == before


def test_a_cluster_gets_the_servers_alone_and_its_secrets(team: Team) -> None:
    team.type("docker compose down")
    team.type(commands("A cluster that trains"))
    names = team.docker("ps", "--format", "{{.Names}}")
    assert "mlflow" in names and "worker" not in names and "trainer" not in names
    create = commands("A cluster that trains", 1).partition("kubectl apply")[0]
    run = "docker run --rm --volume $PWD:/here --workdir /here --user=0 evaclip:0.1.0"
    kubectl = f'kubectl() {{ echo ---; {run} kubectl "$@" --dry-run=client --output=yaml; }}'
    profile, secrets = filter(None, yaml.safe_load_all(team.type(f"{kubectl}\n{create}")))
    assert profile["data"]["EVACLIP_LAUNCHER"] == "kubernetes"
    wanted = {"PREFECT_API_AUTH_STRING", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"}
    assert set(secrets["data"]) == wanted
