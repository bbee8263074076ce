"""The model that training starts from: random towers, or towers trained elsewhere.

Covers: making and saving it.
Not here: architectures and initial values (evaclip_model); its address (config.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from evaclip_model.create import create_model
from evaclip_model.model_config import CONFIG_FILE
from evaclip_model.weights import WEIGHTS_FILE, load_weights, save_model
from tasks.artifact import Made
from tasks.initialise.config import InitialiseConfig
from tasks.progress import Report

MODEL_FOLDER = "model"


def initialise_model(config: InitialiseConfig, out: Path, report: Report) -> Made:
    """Write `model/config.json` and `model/model.safetensors` into `out`.

    Raises:
        InputError: weights that cannot be read or do not fit the architecture.
    """
    parts: tuple[tuple[Literal["vision", "text"], Path | None], ...] = (
        ("vision", config.vision),
        ("text", config.text),
    )
    steps = 2 + sum(path is not None for _, path in parts)
    report(0, steps, "initial values")
    model = create_model(config.architecture(), seed=config.seed)
    counts = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    for step, (part, path) in enumerate(((p, f) for p, f in parts if f is not None), start=1):
        report(step, steps, f"{part} tower from {path}")
        loaded = load_weights(model, path, part)
        counts[f"{part}.loaded"] = len(loaded.loaded)
        counts[f"{part}.resized"] = len(loaded.resized)
    report(steps - 1, steps, "saving")
    folder = out / MODEL_FOLDER
    save_model(model, folder)
    report(steps, steps, "saved")
    return Made(counts, (folder / CONFIG_FILE, folder / WEIGHTS_FILE))
