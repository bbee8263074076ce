"""The profile: where things run. It never changes a result.

Covers: the settings read from the environment (prefix EVACLIP_) or a `.env` file.
Not here: anything that decides a result; that is the recipe's.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from evaclip_model.config import explain
from evaclip_model.errors import InputError
from tasks.download.spread import Distributor
from tasks.tracking import TrackingStore


class Profile(BaseSettings):
    """Storage, servers and machine of this run."""

    model_config = SettingsConfigDict(
        env_prefix="EVACLIP_", env_file=".env", extra="ignore", frozen=True, populate_by_name=True
    )

    root: Path = Path("runs")
    """Folder of all artifacts; also of the embedded servers' databases."""
    tracking_uri: str = Field(
        "", validation_alias=AliasChoices("EVACLIP_TRACKING_URI", "MLFLOW_TRACKING_URI")
    )
    """MLflow server or database; empty: SQLite under `root`."""
    ranks: int = Field(0, ge=0)
    """Training processes; 0: one a GPU, or two on a CPU with two cores and more."""
    merge_workers: int = Field(1, gt=0)
    """Tasks that work on a phase of the merge at once; 1: no tasks, the database's own threads."""
    download_processes: int = Field(default_factory=lambda: os.cpu_count() or 1, gt=0)
    """Downloader processes."""
    download_threads: int = Field(32, gt=0)
    """Connections open at once in each downloader process."""
    download_distributor: Distributor = "multiprocessing"
    """What starts downloader processes: `multiprocessing`, or `pyspark` or `ray` over machines."""

    @property
    def mlflow_uri(self) -> str:
        """The tracking URI with its default filled in."""
        return self.tracking_uri or f"sqlite:///{self.root.resolve()}/mlflow.db"


def load_profile() -> Profile:
    """Read the profile.

    Raises:
        InputError: a setting has a wrong value, or the tracking URI is of no kind that is known.
    """
    try:
        profile = Profile()
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        name = field if field.isupper() else f"EVACLIP_{field.upper()}"
        wrong = explain(Profile, error).replace(f"'{field}'", name, 1)
        raise InputError(f"environment setting {wrong}") from None
    TrackingStore.at(profile.mlflow_uri, experiment="")
    return profile
