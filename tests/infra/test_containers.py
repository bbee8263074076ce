"""The image of infra/Dockerfile, built and run by Debian's Docker, as root; its base is made by
debootstrap, since no registry of images is asked. `make check-infra INSTALL=1` gets both."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.flows.command import CHECKOUT, small_demo
from tests.infra.site import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        os.geteuid() != 0 or not (shutil.which("dockerd") and shutil.which("debootstrap")),
        reason="needs root and `apt-get install docker.io debootstrap`",
    ),
]
BASE, KUBECTL, IMAGE = "evaclip-base:test", "evaclip-kubectl:test", "evaclip:test"
PACKAGES = "python3,python3-venv,python3-dev,ca-certificates"
OF_THIS_MACHINE = (
    *("etc/ssl/certs/ca-certificates.crt", "etc/pip.conf", "etc/xdg/pip"),
    *("root/.config/pip", "opt/wheels"),
)
"""What lets pip in the container reach what it reaches here, where there is such a thing."""
SECRET = "a-secret-of-the-test"
Docker = Callable[..., str]


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    """Runs `docker` with some words against a daemon of our own; returns all that it said."""
    folder = tmp_path_factory.mktemp("docker")
    socket = f"unix://{folder}/socket"
    places = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
    words = [f"--{name}={folder}/{place}" for name, place in places.items()]
    with (folder / "log").open("w") as log:
        daemon = subprocess.Popen(["dockerd", "--host", socket, *words], stdout=log, stderr=log)

    def command(*words: str, is_fine: bool = True) -> str:
        ended = subprocess.run(
            ["docker", "--host", socket, *words], capture_output=True, text=True, cwd=CHECKOUT
        )
        said = ended.stdout + ended.stderr
        assert ended.returncode == 0 or not is_fine, said[-3000:]
        return said

    try:
        assert wait_for(lambda: "Server Version" in command("info", is_fine=False), 60)
        yield command
    finally:
        daemon.terminate()
        daemon.wait(60)
        for mounted in folder.glob("exec/netns/*"):  # or the folder could never be removed
            subprocess.run(["umount", str(mounted)], check=True)
        shutil.rmtree(folder)


def pack_folder(folder: Path, tar: Path) -> str:
    with tarfile.open(tar, "w") as packed:
        packed.add(folder, ".")
    return str(tar)


@pytest.fixture(scope="module")
def image(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    base, kubectl = folder / "base", folder / "kubectl"
    made = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(base)]
    subprocess.run(made, check=True, capture_output=True)
    (base / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    there = [name for name in OF_THIS_MACHINE if Path("/", name).exists()]
    copy = ["cp", "--recursive", "--dereference", "--remove-destination", "--parents"]
    subprocess.run([*copy, *there, str(base)], check=True, cwd="/")
    (kubectl / "bin").mkdir(parents=True)
    (kubectl / "bin/kubectl").write_text("#!/bin/sh\necho a stand-in\n")
    (kubectl / "bin/kubectl").chmod(0o755)
    docker("import", pack_folder(base, folder / "base.tar"), BASE)
    docker("import", pack_folder(kubectl, folder / "kubectl.tar"), KUBECTL)
    images = [f"--build-arg=PYTHON_IMAGE={BASE}", f"--build-arg=KUBECTL_IMAGE={KUBECTL}"]
    command = ["build", "--network=host", *images, "--file=infra/Dockerfile", f"--tag={IMAGE}", "."]
    docker(*command)
    return IMAGE


def test_the_image_runs_as_its_user_and_lists_the_recipes(docker: Docker, image: str) -> None:
    said = docker("run", "--rm", image)
    assert "eva02-clip-l-14" in said and "metadata to registered model" in said
    assert docker("run", "--rm", image, "id", "-u").strip().endswith("1000")
    doctor = docker("run", "--rm", image, "python", "-m", "flows", "doctor", is_fine=False)
    assert "packages as tested" in doctor


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


def run_demo(docker: Docker, image: str, name: str, overrides: Sequence[str]) -> list[str]:
    settings = [word for one in overrides for word in ("--set", one)]
    flow = ["python", "-m", "flows", "run", "pipeline", "demo", *settings]
    return ["run", f"--name={name}", "--volume=runs:/runs", "--shm-size=1g", image, *flow]


def test_the_demo_runs_in_a_container_that_is_killed_and_started_again(
    docker: Docker, image: str, tmp_path: Path
) -> None:
    words = run_demo(docker, image, "demo", small_demo(tmp_path).overrides)
    docker("run", "--detach", *words[1:])
    assert wait_for(lambda: "merge" in docker("logs", "demo"), 300)
    docker("kill", "demo")
    docker("start", "demo")
    docker("wait", "demo")
    said = docker("logs", "demo")
    assert "PROMOTE: no champion yet" in said, said[-3000:]
