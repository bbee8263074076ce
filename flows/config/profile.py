"""The profile: where things run, from the environment (prefix EVACLIP_) or a `.env` file. It never
changes a result."""

import json
import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from evaclip_model.config import explain_error
from evaclip_model.errors import InputError
from tasks.download.config import Distributor
from tasks.evaluate.config import EvaluationMachine
from tasks.process.launch import RankLaunch, count_gpus
from tasks.register.config import COPIED, LargeWeights
from tasks.tracking import TrackingStore
from tasks.train.config import Launch

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""A path that begins so is a URL whose double slash became one when it was read as a path."""
_READ = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True, populate_by_name=True)


class VerifyLaunch(BaseSettings, RankLaunch):
    """Settings of starting the processes that verify; unset: one for each core of this machine."""

    PREFIX = "EVACLIP_VERIFY_"
    model_config = _READ | SettingsConfigDict(env_prefix=PREFIX)


class Profile(BaseSettings, Launch):
    """Storage, servers and machines of this run; the inherited `Launch` starts training."""

    model_config = _READ | SettingsConfigDict(env_prefix=Launch.PREFIX)

    root: Annotated[Path, AfterValidator(Path.expanduser)] = Path("runs")  # no shell reads .env
    """Folder of all artifacts; also of the embedded servers' databases."""
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

    @property
    def large_weights(self) -> LargeWeights:
        return LargeWeights(self.registry_copy_gb, self.registry_weights)

    @property
    def weight_places(self) -> tuple[str, ...]:
        """Folders and URIs below which a registry's versions may refer to their weights."""
        return tuple(filter(None, (str(self.root.resolve()), self.registry_weights)))

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
        return Launch(**{name: getattr(self, name) for name in Launch.model_fields})

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
    if URL.match(str(profile.root)):
        raise InputError(
            f"EVACLIP_ROOT is '{profile.root}': the root of all artifacts must be a folder "
            "that every machine of the run mounts; object storage is for shards to read, "
            "checkpoints (EVACLIP_CHECKPOINT_URL) and the registry's weights"
        )
    TrackingStore.at(profile.mlflow_uri, experiment="")
    _know_secret(profile)
    return profile


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
