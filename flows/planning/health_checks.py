"""Checks of this machine: versions, disk, stores, servers, GPUs, and what to do about each. Not
here: what a recipe needs (run_plan.py)."""

import functools
import importlib.metadata
import os
import re
import shutil
import socket
import time
import tomllib
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from evaclip_model.errors import InputError
from evaclip_model.tokenizer.bundled_assets import VOCABULARY, package_file
from flows.config.profile import Profile
from flows.config.recipe import Recipe
from flows.planning.run_plan import Finding, ask_driver, check_tracking_place
from tasks.artifacts.artifact import sha256_of
from tasks.process.cluster import CLUSTERS
from tasks.process.launch import count_gpus, read_hostfile
from tasks.redact import redact_text
from tasks.tracking import TrackingStore

CHECKOUT = Path(__file__).resolve().parents[2]
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
"""Of the file that OpenAI published with CLIP."""
FREE_BYTES = 10_000_000_000
SHARED_BYTES = 1_000_000_000
CLOCK_S = 5.0
PORTS = {"prefect": (4200, "api/health"), "mlflow": (5000, "health"), "search": (4300, "health")}
"""Of `make up`, where EVACLIP_PREFECT_PORT and the like do not say otherwise; pages."""
OCCUPIED = "another program's"
Check = Callable[[Profile], Iterable[Finding]]


def examine_machine(profile: Profile) -> Iterator[Finding]:
    """Every check's findings; a check that breaks is itself a finding."""
    for check in CHECKS:
        try:
            yield from check(profile)
        except Exception as error:
            said = redact_text(str(error))
            if not isinstance(error, InputError):  # whose sentence ends with what to do
                said = f"{type(error).__name__}: {said[:200]}"
            what = check.__name__.removeprefix("check_").replace("_", " ")
            yield Finding("fail", what, said)


def check_versions(_: Profile) -> Iterator[Finding]:
    """Installed versions beside the bounds of pyproject.toml and the tested ones."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["pipeline"]]
    pins = (CHECKOUT / "infra" / "constraints.txt").read_text()
    tested = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", pins, re.MULTILINE))
    here = [one for one in map(Requirement, wanted) if not one.marker or one.marker.evaluate()]
    bad = list(version_findings(here, tested, _installed_version))
    yield from bad or [Finding("ok", "versions", f"{len(here)} packages as tested")]


def version_findings(
    wanted: Iterable[Requirement], tested: dict[str, str], installed: Callable[[str], str | None]
) -> Iterator[Finding]:
    """Packages not installed, out of bounds, or of another version than was tested."""
    for requirement in wanted:
        found = installed(requirement.name)
        expected = tested.get(canonicalize_name(requirement.name), "")
        if found is None:
            do = f"run `make setup`, or pip install '{requirement}'"
            yield Finding("fail", requirement.name, "not installed", do)
        elif not requirement.specifier.contains(found.partition("+")[0], prereleases=True):
            do = f"pip install '{requirement.name}=={expected}': it must be {requirement.specifier}"
            yield Finding("fail", requirement.name, found, do)
        elif found.partition("+")[0] != expected:
            yield Finding("warn", requirement.name, found, f"tested was {expected}")
    if installed("dataclasses") is not None:
        do = "pip uninstall dataclasses: Prefect's server imports this back-port and breaks"
        yield Finding("fail", "dataclasses", "installed", do)


def check_root(profile: Profile) -> Iterator[Finding]:
    """Free space, and a file written, renamed and removed."""
    folder = profile.root.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".doctor-") as probe:
            written = Path(probe) / "written"
            written.write_bytes(b"x")
            written.rename(written.with_suffix(".renamed"))
    except OSError as error:
        do = "make it writable, or set EVACLIP_ROOT to another folder"
        yield Finding("fail", "artifact root", f"{folder}: {error.strerror}", do)
        return
    free = shutil.disk_usage(folder).free
    found = f"{folder} is writable, {free / 1e9:,.1f} GB are free"
    do = "free some, or set EVACLIP_ROOT to another disk"
    yield Finding.of(free >= FREE_BYTES, "artifact root", found, do, "warn")


def check_tracking(profile: Profile) -> Iterator[Finding]:
    """Check the store, and that the files of the models in use are where its registry says."""
    from tasks.register.model_versions import check_models  # imports mlflow

    store = TrackingStore.at(profile.mlflow_uri, "doctor")
    found = f"{store.uri} takes runs, {redact_text(store.try_out())} takes files"
    yield Finding("ok", "tracking", found)
    yield from check_tracking_place(profile)
    for model, problem in check_models(store.uri):
        yield Finding.of(not problem, model, problem or "its files are there", "")


def check_servers(profile: Profile) -> Iterator[Finding]:
    """Check that servers answer, with our versions and time (for heartbeats, signatures of S3)."""
    urls = {}
    if api := os.environ.get("PREFECT_API_URL"):
        urls["Prefect"] = f"{api.rstrip('/')}/admin/version"
    else:
        yield Finding("ok", "Prefect", "no server is named: every run brings its own")
    if profile.mlflow_uri.startswith("http"):
        urls["MLflow"] = f"{profile.mlflow_uri.rstrip('/')}/version"
    for name, url in urls.items():
        ours = _installed_version(name.lower())
        try:
            body, date = _get_page(url)
        except (OSError, ValueError) as error:
            do = "start it, or correct its address"
            yield Finding("fail", name, f"{redact_text(url)} does not answer: {error}", do)
            continue
        theirs = body.strip('"')
        found = f"{redact_text(url).rpartition('/')[0]} is {theirs}, here is {ours}"
        yield Finding.of(theirs == ours, name, found, f"use {ours} on both sides", "warn")
        apart = abs(time.time() - parsedate_to_datetime(date).timestamp()) if date else 0.0
        found, do = f"{apart:.0f} s from the server's", "set both by NTP: S3 refuses at 15 minutes"
        yield Finding.of(apart <= CLOCK_S, f"clock of {name}", found, do, "warn")


def check_ports(_: Profile) -> Iterator[Finding]:
    """Check that `make up` could have its ports, or has them."""
    for name, (usual, path) in PORTS.items():
        setting = f"EVACLIP_{name.upper()}_PORT"
        port, found = int(os.environ.get(setting, usual)), "free"
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            try:
                _get_page(f"http://127.0.0.1:{port}/{path}")
                found = "in use by it"
            except (OSError, ValueError):
                found = OCCUPIED
        do = f"stop that, or give `make up` another: {setting}"
        yield Finding.of(found != OCCUPIED, f"port {port} for {name}", found, do, "warn")


def check_gpus(_: Profile) -> Iterator[Finding]:
    count = count_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not count:
        yield Finding("ok", "GPUs", "none, training runs on the CPU")
        return
    asked = ask_driver("name,memory.total,driver_version")
    if not asked:
        yield Finding("fail", "GPUs", f"{count}, but nvidia-smi does not answer", "mend the driver")
        return
    import torch  # takes seconds: only where there is something to ask

    kinds = {f"{name} {float(memory) / 1024:.0f} GB" for name, memory, _ in asked}
    found = (
        f"{count} of {', '.join(sorted(kinds))}, driver {asked[0][2]}, CUDA {torch.version.cuda}"
    )
    do = "name equal ones in CUDA_VISIBLE_DEVICES: ranks wait for the slowest"
    finding = Finding.of(len(kinds) == 1, "GPUs", found, do, "warn")
    if not torch.cuda.is_available():
        do = "install a PyTorch for this driver's CUDA (TORCH_INDEX_URL), then `make setup`"
        finding = Finding("fail", "GPUs", f"{found}: torch cannot use them", do)
    yield finding
    flash = _installed_version("flash-attn")
    yield Finding("ok", "flash-attn", flash or "not installed, torch's own fused attention is used")


def check_tokenizer(_: Profile) -> Iterator[Finding]:
    path = package_file(VOCABULARY)
    digest = sha256_of(path) if path else ""
    found = f"{path or VOCABULARY}, sha256 {digest[:16] or 'of nothing: it is not installed'}"
    do = "pip install --force-reinstall open_clip_torch"
    yield Finding.of(digest == VOCABULARY_SHA256, "tokenizer", found, do)


def check_weights(recipe: Recipe) -> Iterator[Finding]:
    """Size and checksum of every file that a recipe begins with, for comparison by a person."""
    for role, path in recipe.initialise.outside_files().items():
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in (one for one in files if one.is_file()):
            found = f"{file}, {file.stat().st_size / 1e6:,.0f} MB, sha256 {sha256_of(file)}"
            yield Finding("ok", f"weights of {role}", found)


def check_launcher(profile: Profile) -> Iterator[Finding]:
    """Programs and files that starting training needs."""
    if profile.launcher in CLUSTERS:
        cluster = CLUSTERS["slurm" if profile.launcher == "slurm" else "kubernetes"]
        missing = sorted(tool for tool in cluster.tools if shutil.which(tool) is None)
        template = profile.job_template or cluster.template
        found, do = f"jobs from {template}", "it is not a file: correct EVACLIP_JOB_TEMPLATE"
        if missing:
            do = "install the cluster's client, or choose another EVACLIP_LAUNCHER"
            found = f"{', '.join(missing)} not on the PATH"
        yield Finding.of(not missing and template.is_file(), profile.launcher, found, do)
    elif profile.launcher == "deepspeed" and profile.hostfile is not None:
        hosts = read_hostfile(profile.hostfile)
        found = f"{len(hosts)} machines, {sum(hosts.values())} ranks"
        is_fine = len(hosts) == 1 or shutil.which("pdsh") is not None
        yield Finding.of(is_fine, "deepspeed", found, "install pdsh: it is not on the PATH")


def shared_memory(_: Profile) -> Iterator[Finding]:
    """Reading processes hand images over in /dev/shm."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    do = "give the container more (--shm-size=16g), or set EVACLIP_READ_WORKERS=0"
    found = f"{free / 1e9:,.1f} GB are free"
    yield Finding.of(free >= SHARED_BYTES, "/dev/shm", found, do, "warn")


CHECKS: tuple[Check, ...] = (
    *(check_versions, check_root, check_tracking, check_servers, check_ports),
    *(check_gpus, check_tokenizer, check_launcher, shared_memory),
)


@functools.cache
def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _get_page(url: str) -> tuple[str, str | None]:
    """Body and date of an answer; each server is told who asks by its own setting."""
    mlflow = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    names = ("PREFECT_API_AUTH_STRING",) if "/api/" in url else mlflow
    auth = ":".join(filter(None, map(os.environ.get, names)))
    headers = {"Authorization": f"Basic {b64encode(auth.encode()).decode()}"} if auth else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read().decode(), answer.headers.get("Date")
