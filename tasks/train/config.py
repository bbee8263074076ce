"""What decides a training stage's artifact.

Covers: the stage and its address.
Not here: the settings themselves (evaclip_model/train_config.py).
"""

from __future__ import annotations

from pathlib import Path

from evaclip_model.train_config import TrainConfig
from tasks.artifact import Address, Stage

STAGE = Stage("train", 1, tools=("torch", "deepspeed"))


def address(root: Path, config: TrainConfig, start_from: str, verify: str) -> Address:
    """Where a trained model is or will be.

    Args:
        start_from: digest of the artifact that holds the model to start from.
        verify: digest of the verified shards.
    """
    return Address.of(root, STAGE, config, {"start_from": start_from, "verify": verify})
