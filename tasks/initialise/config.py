"""What decides the model that training starts from.

Covers: architecture, resolution, where each tower's weights come from, the seed of the rest; the
artifact's address.
Not here: making it (initialise.py). Does not import torch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from evaclip_model.config import Config
from evaclip_model.errors import InputError
from evaclip_model.model_config import ModelConfig, model_names
from tasks.artifact import Address, Stage

STAGE = Stage("initialise", 1, tools=("torch", "safetensors"))

_SAMPLE_BYTES = 1 << 20


class InitialiseConfig(Config):
    """The `[initialise]` table of a recipe."""

    model: str
    """A shipped architecture's name (`evaclip models`), or a JSON file of one."""
    image_px: int | None = Field(default=None, gt=0)
    """Side of the input in pixels, a multiple of the patch; none = the architecture's own."""
    vision: Path | None = None
    """File or folder of weights for the image tower; none = random."""
    text: Path | None = None
    """File or folder of weights for the text tower; none = random."""
    seed: int = Field(default=0, ge=0)
    """Decides every value that no file gives."""

    @model_validator(mode="after")
    def _model_exists(self) -> Self:
        try:
            self.architecture()
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    def architecture(self) -> ModelConfig:
        """The model's config at the resolution asked for."""
        config = ModelConfig.load(self.model)
        return config if self.image_px is None else config.at_image_px(self.image_px)


def address(root: Path, config: InitialiseConfig) -> Address:
    """Where the artifact is or will be; the files it starts from count by content.

    Raises:
        InputError: a file of weights does not exist.
    """
    parents = {
        role: fingerprint(path)
        for role, path in (("vision", config.vision), ("text", config.text))
        if path is not None
    }
    if config.model not in model_names():
        parents["model"] = fingerprint(Path(config.model))
    return Address.of(root, STAGE, config, parents)


def fingerprint(path: Path) -> str:
    """Identity of a file of weights (or of a config) by its size and its first and last MiB.

    Weights have gigabytes; the list of tensors at one end and values at the other tell two files
    apart.

    Raises:
        InputError: there is no such file, nor a folder that holds a saved model.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise InputError(f"weights {path} do not exist: give a file, or a saved model's folder")
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
