"""Weights too large to copy into the registry: where they stay, and the reference to them.

Covers: choosing between a copy and a reference, putting weights into a store of their own.
Not here: the reference's form, fetching (evaclip_model/weights/external_weights.py), packing
(packing.py).
"""

from __future__ import annotations

from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.weights.checkpoint_files import WEIGHTS_FILE
from evaclip_model.weights.external_weights import Reference
from tasks.register.config import LargeWeights

GB = 10**9


def reference_to(model: Path, sha256: str, large: LargeWeights) -> Reference | None:
    """The reference to the weights of a saved model, put into their place; None for a copy.

    Raises:
        InputError: the place does not take them.
    """
    weights = model / WEIGHTS_FILE
    size = weights.stat().st_size
    if size <= large.above_gb * GB:
        return None
    uri = _put(weights, f"{large.place.rstrip('/')}/{sha256}") if large.place else ""
    return Reference(uri=uri or weights.resolve().as_uri(), size=size, sha256=sha256)


def _put(weights: Path, folder: str) -> str:
    """Put a file into a store's folder, unless one of its size is there; returns the file's URI."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if "://" not in folder:
        folder = Path(folder).resolve().as_uri()
    try:
        repository = get_artifact_repository(folder)
        sizes = {Path(file.path).name: file.file_size for file in repository.list_artifacts()}
        if sizes.get(weights.name) != weights.stat().st_size:
            repository.log_artifact(str(weights))
    except Exception as error:  # every store has errors of its own
        raise InputError(
            f"the weights cannot be put into {folder} ({type(error).__name__}: "
            f"{str(error)[:160]}): mend it, or name another place in EVACLIP_REGISTRY_WEIGHTS"
        ) from error
    return f"{folder}/{weights.name}"
