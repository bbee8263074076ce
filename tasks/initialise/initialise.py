"""The model that training starts from: random, towers trained elsewhere, or a whole CLIP.

A tower from a file leaves the image head, the text projection and the temperature at their initial
values, and the norm inside EVA-02's attention, which pretraining lacks, at gain 1 and bias 0 (the
authors' initialisation); a whole CLIP gives every value.
"""

from collections.abc import Mapping
from pathlib import Path

from evaclip_model.create import create_model
from evaclip_model.model.model_config import CONFIG_FILE
from evaclip_model.weights.checkpoint_files import WEIGHTS_FILE
from evaclip_model.weights.load import PREPROCESSING_FILE, load_weights, save_model
from tasks.artifacts.artifact import Made
from tasks.initialise.config import InitialiseConfig, Role
from tasks.progress import Report

MODEL_FOLDER = "model"
_WHAT = {"clip": "the whole model", "vision": "vision tower", "text": "text tower"}


def initialise_model(
    config: InitialiseConfig, out: Path, report: Report, pulled: Mapping[Role, Path] | None = None
) -> Made:
    """Write the model's folder into `out`; `pulled` has the folders of registered models.
    InputError: weights that cannot be read or do not fit the architecture."""
    sources = {**config.weight_sources(), **(pulled or {})}
    steps = 2 + len(sources)
    report(0, steps, "initial values")
    model = create_model(config.load_architecture(), seed=config.seed)
    counts = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    for step, (role, path) in enumerate(sources.items(), start=1):
        report(step, steps, f"{_WHAT[role]} from {path}")
        part = "all" if role == "clip" else role
        loaded = load_weights(model, path, part=part, allow_torchscript=config.allow_torchscript)
        for kind in ("loaded", "resized", "expected_gaps", "ignored"):
            counts[f"{role}.{kind}"] = len(getattr(loaded, kind))
    report(steps - 1, steps, "saving")
    folder = out / MODEL_FOLDER
    save_model(model, folder)
    report(steps, steps, "saved")
    names = (CONFIG_FILE, WEIGHTS_FILE, PREPROCESSING_FILE)
    return Made(counts, tuple(folder / name for name in names))
