"""A small model with random weights as the champion of a registry."""

from __future__ import annotations

from pathlib import Path

from evaclip_model import create_model, save_model
from tasks.artifacts.artifact import Address, Artifact, Made, Stage, produce_artifact
from tasks.register.config import COPIED, STAGE, LargeWeights, RegisterConfig
from tasks.register.model_registry import register_model
from tasks.register.promotion import promote_version
from tasks.tracking import TrackingStore


def trained_and_evaluated(
    root: Path, seed: int = 0, architecture: str = "EVA02-CLIP-demo"
) -> tuple[Artifact, Artifact]:
    """A model and its evaluation, as artifacts under `root`."""

    def train(out: Path) -> Made:
        save_model(create_model(architecture, seed=seed), out / "model")
        return Made({"steps": 1}, tuple((out / "model").iterdir()))

    trained = produce_artifact(
        Address(root, Stage("train", 1), {"name": "stage-1", "seed": seed}), train
    )
    evaluated = produce_artifact(
        Address(root, Stage("evaluate", 1), {}, {"train": trained.digest}),
        lambda out: Made({"emoji.top1": 0.5}, ()),
    )
    return trained, evaluated


def register_random_model(
    store: TrackingStore,
    root: Path,
    name: str,
    seed: int = 0,
    large: LargeWeights = COPIED,
    architecture: str = "EVA02-CLIP-demo",
) -> Artifact:
    """Register one, make it champion; returns the registration."""
    trained, evaluated = trained_and_evaluated(root, seed, architecture)
    config = RegisterConfig(model_name=name)
    made_from = {"train": trained.digest, "evaluate": evaluated.digest, "tracking": store.uri}
    registered = produce_artifact(
        Address.of(root, STAGE, config, made_from),
        lambda out: register_model(config, trained, evaluated, store, root, out, large=large),
    )
    version = int(registered.counts["version"])
    promote_version(store, name, "champion", version, "force", "tests", "a model is needed")
    return registered
