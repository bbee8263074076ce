"""The profile: where things run, from the environment (prefix EVACLIP_) or a `.env` file. It never
changes a result."""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from evaclip_model.config import explain_error
from evaclip_model.errors import InputError
from evaclip_model.reading.urls import is_url
from tasks.artifacts.root_store import open_working_copy
from tasks.download.config import Distributor
from tasks.evaluate.config import EvaluationMachine
from tasks.process.launch import RankLaunch, count_gpus
from tasks.register.config import COPIED, LargeWeights
from tasks.tracking import TrackingStore
from tasks.train.config import Launch

_READ = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True, populate_by_name=True)


class VerifyLaunch(BaseSettings, RankLaunch):
    """Settings of starting the processes that verify; unset: one for each core of this machine."""

    PREFIX = "EVACLIP_VERIFY_"
    model_config = _READ | SettingsConfigDict(env_prefix=PREFIX)


class Profile(BaseSettings, Launch):
    """Storage, servers and machines of this run; the inherited `Launch` starts training."""

    model_config = _READ | SettingsConfigDict(env_prefix=Launch.PREFIX)

    root: Annotated[Path, AfterValidator(Path.expanduser)] = Path("runs")  # no shell reads .env
    """Folder of all artifacts, also of the embedded servers' databases; or a URL that fsspec knows
    (s3://bucket/runs): then this is a working copy of it."""
    root_url: str = ""
    """That URL; not a setting."""
    root_cache: Path | None = None
    """Folder for working copies, each under its URL's hash; unset: in the user's cache."""
    root_cache_gb: float = Field(50.0, ge=0)
    """Most that finished artifacts take in it when a command begins, in GB."""
    tracking_uri: str = Field(
        "", validation_alias=AliasChoices("EVACLIP_TRACKING_URI", "MLFLOW_TRACKING_URI")
    )
    """MLflow server or database; empty: SQLite under `root`."""
    search_port: int = 4300  # of the search page of `make up`, to which reports link
    openlineage_file: Path | None = None
    """File that gets every run as OpenLineage events, for a catalogue that reads them."""
    merge_workers: int = Field(1, gt=0)
    """Tasks that work on a phase of the merge at once; 1: no tasks, the database's own threads."""
    download_processes: int = Field(default_factory=lambda: os.cpu_count() or 1, gt=0)
    """Downloader processes."""
    download_threads: int = Field(32, gt=0)
    """Connections open at once in each downloader process."""
    download_distributor: Distributor = "multiprocessing"
    """What starts downloader processes: `multiprocessing`, or `pyspark` or `ray` over machines."""

    evaluate_here: bool = False
    """Whether embedding and evaluation run on this machine, whatever starts training."""
    evaluate_ranks: int = Field(0, ge=0)
    """Processes of a machine that encode for them; 0: one a GPU, or one on the CPU; on other
    machines `ranks`."""
    evaluate_gpus: int | None = Field(None, ge=0)
    """GPUs of each machine for them, 0: none; unset: those of this machine, elsewhere one a rank.
    """
    evaluate_workers: int | None = Field(None, ge=0)
    """Decoding threads of each; unset: the cores that its GPU leaves."""
    evaluate_cache_gb: float = Field(20.0, ge=0)
    """Most that features of evaluations take under `root`, in GB."""

    verify_launch: VerifyLaunch = Field(default_factory=VerifyLaunch)

    registry_copy_gb: float = Field(COPIED.above_gb, ge=0)
    """Weights of more GB are not copied into the registry: it gets where they are, and which."""
    registry_weights: str = COPIED.place
    """Folder or `s3://…` for them, each once; empty: they stay where they were trained."""

    @model_validator(mode="before")
    @classmethod
    def _place_working_copy(cls, values: dict[str, Any]) -> dict[str, Any]:
        url = str(values.get("root", "")).rstrip("/")
        if not is_url(url):
            return {**values, "root_url": ""}
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evaclip"
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        root = Path(values.get("root_cache") or cache / "roots") / name
        return {**values, "root_url": url, "root": root}

    @property
    def large_weights(self) -> LargeWeights:
        return LargeWeights(self.registry_copy_gb, self._weights)

    @property
    def weight_places(self) -> tuple[str, ...]:
        """Folders and URIs below which a registry's versions may refer to their weights."""
        return tuple(filter(None, (str(self.root.resolve()), self._weights)))

    @property
    def _weights(self) -> str:
        return self.registry_weights or (self.root_url and f"{self.root_url}/weights")

    @property
    def machine(self) -> EvaluationMachine:
        """The machines that encode, for embedding and evaluation."""
        ranks = self.evaluate_ranks or self.ranks
        launch = (
            RankLaunch() if self.evaluate_here else self.launch.model_copy(update={"ranks": ranks})
        )
        elsewhere = 0 if launch.is_local else launch.ranks
        gpus = elsewhere or count_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return EvaluationMachine(
            ranks=self.evaluate_ranks,
            workers=self.evaluate_workers,
            cache=self.root.resolve() / "cache" / "evaluate",
            cache_gb=self.evaluate_cache_gb,
            gpus=gpus if self.evaluate_gpus is None else self.evaluate_gpus,
            launch=launch,
        )

    @property
    def launch(self) -> Launch:
        given = {name: getattr(self, name) for name in Launch.model_fields}
        if self.root_url and not self.checkpoint_url:  # where another machine goes on from them
            given["checkpoint_url"] = f"{self.root_url}/checkpoints"
        return Launch(**given)

    @property
    def mlflow_uri(self) -> str:
        """The tracking URI with its default filled in."""
        return self.tracking_uri or f"sqlite:///{self.root.resolve()}/mlflow.db"


def load_profile() -> Profile:
    """Read the profile, and let the clients of the servers of `make up` know their secret. Call it
    before prefect is imported."""
    try:
        profile = Profile()
    except ValidationError as error:
        read = VerifyLaunch if error.title == VerifyLaunch.__name__ else Profile
        where = error.errors()[0]["loc"]
        if not where:  # settings that do not fit each other name themselves
            raise InputError(explain_error(read, error)) from None
        field = str(where[0])
        name = field if field.isupper() else f"{read.PREFIX}{field.upper()}"
        wrong = explain_error(read, error).replace(f"'{field}'", name, 1)
        raise InputError(f"environment setting {wrong}") from None
    if profile.root_url:
        _require_shared(profile)
        place, room = profile.root.resolve(), profile.root_cache_gb * 1e9
        open_working_copy(profile.root_url, place, room)
    TrackingStore.at(profile.mlflow_uri, experiment="")
    _know_secret(profile)
    return profile


def _require_shared(profile: Profile) -> None:
    """Refuse a root at a URL that not all of its processes would see."""
    said = f"EVACLIP_ROOT is {profile.root_url}"
    if profile.root_url.startswith("memory:"):
        raise InputError(f"{said}, which ends with each process: take one as s3://bucket/runs")
    is_here = profile.launch.is_local and profile.download_distributor == "multiprocessing"
    if not is_here and profile.root_cache is None:
        raise InputError(
            f"{said}, and EVACLIP_LAUNCHER or EVACLIP_DOWNLOAD_DISTRIBUTOR starts work on other "
            "machines, which meets in its working copy: set EVACLIP_ROOT_CACHE to a folder that "
            "all of them mount at the same path"
        )


def _know_secret(profile: Profile) -> None:
    """Set what each server of `make up` asks for, where it is the one that is named."""
    folder = profile.root / "services"
    try:
        secret = (folder / "prefect-auth").read_text()
    except OSError:
        return
    user, _, password = secret.partition(":")
    mlflow = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    prefect = {"PREFECT_API_AUTH_STRING": secret}
    api = os.environ.get("PREFECT_API_URL", "")
    servers = ("prefect", api, prefect), ("mlflow", profile.mlflow_uri, mlflow)
    for server, url, settings in servers:
        noted = folder / f"{server}.json"
        if noted.exists() and f"{url}/".startswith(json.loads(noted.read_text())["url"] + "/"):
            for name, value in settings.items():
                os.environ.setdefault(name, value)
