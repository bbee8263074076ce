"""The training stage's name and version, and how and where its ranks are started.

Not here: what decides a result (evaclip_model/training/config.py); starting anything (launch.py).
"""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from evaclip_model.config import Config
from evaclip_model.training.config import DECIDE_NOTHING
from tasks.artifacts.artifact import Stage

STAGE = Stage("train", 2, tools=("torch", "deepspeed"), ignores=DECIDE_NOTHING)

Launcher = Literal["auto", "torchrun", "deepspeed", "slurm", "kubernetes", "external"]


class Launch(Config):
    """Settings of starting the ranks of a training run; none changes a result. The field `x` is
    read from the environment as `EVACLIP_X`."""

    launcher: Launcher = "auto"
    """What starts training processes. auto: one plain process, or torchrun for several of them;
    deepspeed: its launcher over the machines of `hostfile`; slurm, kubernetes: a job from
    `job_template`, submitted and followed; external: your own `submit_command`."""
    ranks: int = Field(0, ge=0)
    """Training processes of each machine; 0: one a GPU, or two on a CPU with two cores and more."""
    nodes: int = Field(1, gt=0)
    """Machines."""
    rendezvous: str | None = None
    """Where torchrun's machines meet, `host:port` of the first of them."""
    hostfile: Path | None = None
    """Machines of the deepspeed launcher, one a line: `name slots=PROCESSES`."""
    job_template: Path | None = None
    """Your own copy of infra/slurm/train.sbatch or of one of infra/kubernetes/train-*.yaml."""
    submit_command: str | None = None
    """Starts all ranks and ends when they do. `{job}`, `{run_dir}`, `{ranks}`, `{nodes}` are
    filled in; every rank must run `python -m evaclip_model.training.worker {job}`."""
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

    @field_validator("rendezvous")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and re.fullmatch(r"\S+:\d+", value) is None:
            raise ValueError("must be host:port")
        return value

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

    @model_validator(mode="after")
    def _fits_the_launcher(self) -> Self:
        many, chosen = self.nodes > 1, f"EVACLIP_LAUNCHER={self.launcher}"
        wrong = None
        match self.launcher:
            case "auto" if many:
                wrong = "EVACLIP_NODES is above 1: say what starts them by EVACLIP_LAUNCHER"
            case "torchrun" if many and self.rendezvous is None:
                wrong = "EVACLIP_NODES is above 1: torchrun needs EVACLIP_RENDEZVOUS=host:port too"
            case "deepspeed" if self.hostfile is None:
                wrong = f"{chosen} needs EVACLIP_HOSTFILE=path"
            case "deepspeed" if self.ranks or many:
                wrong = (
                    f"{chosen} takes machines and processes from EVACLIP_HOSTFILE: leave "
                    "EVACLIP_RANKS and EVACLIP_NODES unset"
                )
            case "external" if self.submit_command is None:
                wrong = f"{chosen} needs EVACLIP_SUBMIT_COMMAND"
            case "slurm" | "kubernetes" | "external" if not self.ranks:
                wrong = (
                    f"{chosen} needs EVACLIP_RANKS, the processes of each machine (one a GPU): "
                    "this machine's GPUs say nothing about the others"
                )
        if wrong:
            raise ValueError(wrong)
        return self
