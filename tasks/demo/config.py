"""Settings of the demo's world."""

from __future__ import annotations

from pydantic import Field

from evaclip_model.config import Config


class DemoConfig(Config):
    """Where the demo's pictures are served."""

    port: int = Field(default=8923, ge=1024, le=65535)
    """TCP port on 127.0.0.1; part of every URL, and so of everything made from them."""
