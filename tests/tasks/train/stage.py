"""A training stage so small that its ranks spend their time starting."""

import psutil

from evaclip_model.training.config import TrainConfig
from tasks.progress import silent
from tasks.train.config import Launch
from tasks.train.train import Inputs, train_model

STEPS = 60


def config(**changes):
    settings = {"name": "tiny", "image_px": 8, "samples_seen": 12 * STEPS, "global_batch": 12}
    settings |= {"lanes": 4, "warmup_steps": 2, "checkpoint_every_steps": 10}
    return TrainConfig(**{**settings, **changes})


def train(data, out, launch, report=silent, **changes):
    inputs = Inputs(data / "start", data / "shards.json")
    return train_model(config(**changes), inputs, out, Launch(**launch), report)


def processes_of(out):
    """Every process that was started for the job in `out`: supervisor, launchers, ranks."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if any(part.startswith(f"{out}/") for part in line):
            found.append(process)
    return found


def ranks_of(out):
    """Of them, those that train."""
    job = str(out / "train.json")
    worker = ["-m", "evaclip_model.training.worker", job]
    return [one for one in processes_of(out) if one.info["cmdline"][-3:] == worker
            and len(one.info["cmdline"]) <= 5]  # fmt: skip
