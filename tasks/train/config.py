"""The training stage's name and version, and how and where its ranks are started.

Not here: what decides a result (evaclip_model/training/config.py); what starts ranks
(tasks/process).
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from evaclip_model.training.config import DECIDE_NOTHING
from tasks.artifacts.artifact import Stage
from tasks.process.launch import RankLaunch

STAGE = Stage("train", 2, tools=("torch", "deepspeed"), ignores=DECIDE_NOTHING)


class Launch(RankLaunch):
    """Settings of starting the ranks of a training run; none changes a result. The field `x` is
    read from the environment as `EVACLIP_X`."""

    train_engine: Literal["deepspeed", "torch"] | None = None
    """What steps the optimizer; unset: DeepSpeed."""
    micro_batch: int | None = Field(None, gt=0)
    """Pairs of a rank in memory at once; unset: its whole share of the global batch."""
    compile: bool = False
    """Whether torch's compiler fuses the operations of every block; worth it on a GPU."""
    checkpoint_url: str | None = None
    """Folder of checkpoints that fsspec knows (s3://bucket/runs), each stage under its digest;
    unset: in the stage's own folder."""
    probe: Path | None = None
    """A small evaluation set that recipes with `probe_every_steps` classify during training."""
    read_workers: int | None = Field(None, ge=0)
    """Reading processes of each rank; unset: the cores that the machine's GPUs leave."""
    watchdog_s: float | None = Field(None, gt=0)
    """Seconds without a step after which training is stopped and started again."""
    profile_steps: tuple[int, int] | None = None
    """First and last step that torch's profiler records, as `100-110`."""
    tensorboard: bool = False
    """Whether metrics are written as TensorBoard events too."""

    @field_validator("profile_steps", mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        if value is None:
            return value
        text = "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        found = re.fullmatch(r"(\d+)-(\d+)", text)
        if found is None or int(found[1]) > int(found[2]):
            raise ValueError("must be the first and the last step, as 100-110")
        return int(found[1]), int(found[2])
