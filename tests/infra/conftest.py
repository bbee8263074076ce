"""Docker for tests that want containers: a daemon of our own on a socket in a folder, and a Debian
made by debootstrap as the base of all images, since no registry of images is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.command import CHECKOUT
from tests.infra.site import wait_for

BASE, IMAGE = "evaclip-base:test", "evaclip:0.1.0"
PACKAGES = "python3,python3-venv,python3-dev,ca-certificates,kubernetes-client"
PROGRAMS = ("dockerd", "docker-compose", "debootstrap")


class Docker:
    """A daemon that holds its data below `folder`, and a copy of this checkout to work in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout = folder, folder / "checkout"
        self.socket = f"unix://{folder}/socket"
        places = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
        words = [f"--{name}={folder}/{place}" for name, place in places.items()]
        with (folder / "log").open("w") as log:
            command = ["dockerd", "--host", self.socket, *words]
            self._daemon = subprocess.Popen(command, stdout=log, stderr=log)

    def __call__(self, *words: str, is_fine: bool = True) -> str:
        """All that `docker WORDS` says."""
        return self.shell('docker "$@"', *words, is_fine=is_fine)

    def shell(self, commands: str, *words: str, is_fine: bool = True, **settings: str) -> str:
        """All that commands say which a person types in the copy."""
        env = {**os.environ, "DOCKER_HOST": self.socket, "COMPOSE_DOCKER_CLI_BUILD": "1"}
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands, "bash", *words],
            cwd=self.checkout,
            env={**env, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert ended.returncode == 0 or not is_fine, f"{commands}\n{ended.stdout[-5000:]}"
        return ended.stdout

    def copy_checkout(self) -> None:
        """What is tracked or would be, without environments and runs."""
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=CHECKOUT, capture_output=True, text=True, check=True)
        for name in filter(None, names.stdout.split("\0")):
            if (CHECKOUT / name).is_file():
                (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(CHECKOUT / name, self.checkout / name)

    def import_base(self) -> None:
        """A Debian with Python, in which pip reaches what it reaches here."""
        base = self.folder / "base"
        made = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(base)]
        subprocess.run(made, check=True, capture_output=True)
        (base / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        places = ["/etc/ssl/certs/ca-certificates.crt", *_places_of_pip()]
        there = [place.lstrip("/") for place in places if Path(place).exists()]
        copy = ["cp", "--recursive", "--dereference", "--remove-destination", "--parents"]
        subprocess.run([*copy, *there, str(base)], check=True, cwd="/")
        with tarfile.open(self.folder / "base.tar", "w") as packed:
            packed.add(base, ".")
        self("import", str(self.folder / "base.tar"), BASE)

    def close(self) -> None:
        for container in self("ps", "--all", "--quiet", is_fine=False).split():
            self("rm", "--force", "--volumes", container, is_fine=False)
        self._daemon.terminate()
        self._daemon.wait(60)
        for mounted in self.folder.glob("exec/netns/*"):  # or the folder could never be removed
            subprocess.run(["umount", str(mounted)], check=True)
        shutil.rmtree(self.folder)


def _places_of_pip() -> Iterator[str]:
    """Files of pip's configuration, and folders of packages that they name."""
    said = subprocess.run(["pip", "config", "debug"], capture_output=True, text=True).stdout
    for line in said.splitlines():
        if ", exists: True" in line:
            yield line.strip().partition(", exists:")[0]
        elif "global.constraint:" in line or "global.find-links:" in line:
            yield line.rpartition(": ")[2]


@pytest.fixture(scope="session")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    lacking = [name for name in PROGRAMS if not shutil.which(name)]
    if os.geteuid() != 0 or lacking:
        pytest.skip(f"needs root and Debian's docker.io, docker-compose, debootstrap: {lacking}")
    made = Docker(tmp_path_factory.mktemp("docker"))
    try:
        made.copy_checkout()
        assert wait_for(lambda: "Server Version" in made("info", is_fine=False), 60)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def image(docker: Docker) -> str:
    """infra/Dockerfile, built as it stands."""
    started = time.monotonic()
    docker.import_base()
    bases = [f"--build-arg={name}_IMAGE={BASE}" for name in ("PYTHON", "KUBECTL")]
    print(f"base: {time.monotonic() - started:.0f} s")
    started = time.monotonic()
    build = ["build", "--network=host", *bases, "--file=infra/Dockerfile", f"--tag={IMAGE}", "."]
    docker(*build)
    size = int(docker("image", "inspect", "--format={{.Size}}", IMAGE))
    print(f"{IMAGE}: {time.monotonic() - started:.0f} s, {size / 1e9:.2f} GB")
    return IMAGE
