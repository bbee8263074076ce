"""The image of infra/Dockerfile, built and run by Debian's Docker, as root; `make check-infra
INSTALL=1` gets what that needs. Not here: the stack of compose.yaml (test_compose.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.flows.command import small_demo
from tests.infra.conftest import Docker
from tests.infra.site import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SECRET = "a-secret-of-the-test"


def test_the_image_runs_as_its_user_and_lists_the_recipes(docker: Docker, image: str) -> None:
    said = docker("run", "--rm", image)
    assert "eva02-clip-l-14" in said and "metadata to registered model" in said
    assert docker("run", "--rm", image, "id", "-u").strip().endswith("1000")
    doctor = docker("run", "--rm", image, "python", "-m", "flows", "doctor", is_fine=False)
    assert "packages as tested" in doctor
    assert "EVA02-CLIP-L-14" in docker("run", "--rm", image, "evaclip", "models")
    assert "Client Version" in docker("run", "--rm", image, "kubectl", "version", "--client")


def test_a_package_that_is_not_the_one_of_the_constraints_ends_the_build(
    docker: Docker, image: str
) -> None:
    changed = "sed --in-place s/--hash=sha256:./--hash=sha256:0/ infra/constraints.txt"
    words = f"{changed} && python infra/environment.py /tmp/venv pipeline team"
    user = ["--rm", "--network=host", "--user=0", "--entrypoint=sh"]
    said = docker("run", *user, image, "-c", words, is_fine=False)
    assert "could not install what builds" in said and "THESE PACKAGES DO NOT MATCH" in said, said


def test_secrets_are_files_and_stand_in_no_log_and_no_setting(
    docker: Docker, image: str, tmp_path: Path
) -> None:
    (tmp_path / "PREFECT_API_AUTH_STRING").write_text(SECRET)
    mounted = f"{tmp_path}:/run/secrets:ro"
    tmp_path.chmod(0o755)
    code = "import os; print(len(os.environ['PREFECT_API_AUTH_STRING']))"
    words = ["run", "--name=holder", "--volume", mounted, image, "python", "-c", code]
    assert docker(*words).strip().endswith(str(len(SECRET)))
    shown = docker("logs", "holder") + docker("inspect", "holder") + docker("history", image)
    docker("rm", "holder")
    assert SECRET not in shown


def run_demo(image: str, name: str, overrides: Sequence[str]) -> list[str]:
    settings = [word for one in overrides for word in ("--set", one)]
    flow = ["python", "-m", "flows", "run", "pipeline", "demo", *settings]
    return ["run", f"--name={name}", "--volume=runs:/runs", "--shm-size=1g", image, *flow]


def test_the_demo_runs_in_a_container_that_is_killed_and_started_again(
    docker: Docker, image: str, tmp_path: Path
) -> None:
    words = run_demo(image, "demo", small_demo(tmp_path).overrides)
    docker("run", "--detach", *words[1:])
    assert wait_for(lambda: "merge" in docker("logs", "demo"), 300)
    docker("kill", "demo")
    docker("start", "demo")
    docker("wait", "demo")
    said = docker("logs", "demo")
    assert "PROMOTE: no champion yet" in said, said[-3000:]
