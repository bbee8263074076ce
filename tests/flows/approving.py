"""A flow that asks a person about a registration, as deployments of the project's flows do."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.promotion.apply_decision import apply_decision
from tasks.artifacts.artifact import read_artifact
from tasks.register.config import RegisterConfig
from tasks.tracking import TrackingStore


@flow(name="approving")
def approving(root: str, registered: str) -> bool:
    """Settle the registration in the folder `registered`, in the registry under `root`."""
    store = TrackingStore.at(f"sqlite:///{root}/mlflow.db", "e")
    config = RegisterConfig(model_name="clip")
    return apply_decision(config, store, read_artifact(Path(registered)), "ask")
