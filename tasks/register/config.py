"""What a model is registered as: the `[register]` table of a recipe.

Covers: the config, and the stage whose artifact it decides.
Not here: the registry itself; mlflow is not imported.
"""

from __future__ import annotations

import re

from pydantic import ConfigDict, Field, field_validator

from evaclip_model.config import Config
from tasks.artifact import Stage

STAGE = Stage("register", 1, tools=("mlflow",))
REGISTERED = "registered.json"
"""The artifact's one file: name, version, alias, uri, tracking_uri."""


class RegisterConfig(Config):
    """Name and alias of the registered model."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in the registry; every training that gets it becomes one more version."""
    alias: str = Field("champion", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Alias that the new version takes over: `models:/NAME@ALIAS` loads it."""

    @field_validator("alias")
    @classmethod
    def _is_no_version(cls, value: str) -> str:
        if value == "latest" or re.fullmatch(r"[vV]\d+", value):
            raise ValueError("is reserved by MLflow for versions; take another word")
        return value
