"""The identity of a model, as results record it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from evaclip_model.config import Config

DIGEST_CHARS = 16


class Identity(Config):
    """A model by its content, whatever folder holds it."""

    digest: str
    """Of architecture and weights."""
    text_digest: str
    """Of the text tower's architecture, weights and tokenizer: models that share it share text
    features."""
    transform_digest: str
    """Of `describe_preprocessing`."""
    architecture: str
    params: int
    """Weights, both towers."""
    gflops: float | None
    """Of one image, in billions; a FLOP is half a multiply-add of a matrix product."""
    source: str
    """The specification it was named by."""
    preprocessing: dict[str, Any]
    """The steps that turn an image into the model's input."""
    warnings: tuple[str, ...] = ()
    """Sentences that a reader of its figures should know."""


def digest_of(value: Any) -> str:
    """16 hex digits over anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]
