"""The training stage's name and version.

Not here: the settings themselves (evaclip_model/training/config.py).
"""

from __future__ import annotations

from tasks.artifact import Stage

STAGE = Stage("train", 1, tools=("torch", "deepspeed"))
