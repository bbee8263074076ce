"""Everything a model was made from, read from the manifests of its ancestors.

Covers: walking from an artifact to its parents under one root.
Not here: MLflow.
"""

from __future__ import annotations

from pathlib import Path

from evaclip_model.errors import InputError
from tasks.artifact import Artifact, read_artifact


def ancestry(artifact: Artifact, root: Path) -> dict[str, str]:
    """Label -> digest of `artifact` and of everything it was made from.

    An artifact's label is its kind and, where its config has one, its name (`train.stage-1`); a
    parent that is no artifact under `root` (outside metadata) goes by `KIND.ROLE` of its user.
    """
    digests: dict[str, str] = {}
    queue = [artifact]
    while queue:
        current = queue.pop(0)
        label = _label(current)
        if digests.get(label, current.digest) != current.digest:
            label = f"{label}.{current.digest}"
        digests[label] = current.digest
        for role, digest in current.parents.items():
            parent = _find(root, digest)
            if parent is None:
                digests[f"{current.kind}.{role}"] = digest
            elif parent.digest not in digests.values():
                queue.append(parent)
    return digests


def _label(artifact: Artifact) -> str:
    name = artifact.config.get("name")
    return f"{artifact.kind}.{name}" if isinstance(name, str) else artifact.kind


def _find(root: Path, digest: str) -> Artifact | None:
    for folder in root.glob(f"*/{digest}"):
        try:
            return read_artifact(folder)
        except InputError:
            continue
    return None
