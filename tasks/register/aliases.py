"""The present aliases of a registered version: one may have been moved since it was registered.

Covers: asking the registries that versions were registered in.
Not here: registering (model_registry.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tasks.register.config import REGISTERED
from tasks.tracking import TrackingStore, is_refusal


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model."""

    name: str
    version: int
    tracking_uri: str
    """Of the store whose registry has it."""

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    @classmethod
    def from_registration(cls, folder: Path) -> Self:
        """The version that the registration in `folder` made."""
        one = json.loads((folder / REGISTERED).read_text())
        return cls(one["name"], int(one["version"]), one["tracking_uri"])

    def current_aliases(self) -> tuple[str, ...] | None:
        """Its aliases of now, by name; None if its registry does not answer."""
        store = TrackingStore.at(self.tracking_uri, experiment="")
        if store.database is not None and not store.database.exists():
            return None  # a client would make it
        client = store.client()
        # after client(): it imports MLflow in the order that works
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException

        try:
            version = client.get_model_version(self.name, str(self.version))
        except (MlflowException, RequestException) as error:
            return () if is_refusal(error) else None
        return tuple(sorted(version.aliases))
