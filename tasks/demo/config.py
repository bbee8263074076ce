"""Settings of the demo's world, and the stage that makes it."""

from pydantic import Field

from evaclip_model.config import Config
from tasks.artifacts.artifact import Stage

STAGE = Stage("demo", 1, tools=("pyarrow",))
"""Its version also rises when the committed drawings or captions change."""


class DemoConfig(Config):
    """The port of the demo's web server."""

    port: int = Field(default=8923, ge=1024, le=65535)
    """TCP port on 127.0.0.1; part of every URL, and so of everything made from them."""
