"""A training stage so small that its ranks spend their time starting."""

import psutil

from evaclip_model.training.config import TrainConfig
from tasks.progress import report_nothing
from tasks.train import train as stage
from tasks.train.config import Launch

STEPS = 60


def config(**changes):
    settings = {"name": "tiny", "image_px": 8, "samples_seen": 12 * STEPS, "global_batch": 12}
    settings |= {"lanes": 4, "warmup_steps": 2, "checkpoint_every_steps": 10}
    return TrainConfig(**{**settings, **changes})


def train(data, out, launch, report=report_nothing, **changes):
    inputs = stage.Inputs(data / "start", data / "shards.json")
    return stage.train_model(config(**changes), inputs, out, Launch(**launch), report)


def try_out(data, out, launch, **changes):
    out.mkdir()
    inputs = stage.Inputs(data / "start", data / "shards.json")
    return stage.try_out(config(**changes), inputs, out, Launch(**launch), report_nothing)


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
