"""The model between start and end of a training that is best on some sets without a loss on others
(WiSE-FT, arXiv 2109.01903).

Not here: evaluating (the flow gives it), the weights' mean (evaclip_model/create.py).
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evaclip_model.create import interpolate_weights
from evaclip_model.errors import InputError
from evaclip_model.files import write_atomically
from evaclip_model.training.config import MODEL_FOLDER
from evaclip_model.weights.load import save_model
from tasks.artifacts.artifact import Made
from tasks.interpolate.config import CHOICE, InterpolateConfig
from tasks.progress import Report

Evaluate = Callable[[Mapping[str, Path], Path], Mapping[str, Any]]
"""From models (name -> folder) and a folder for its files to the content of `results.json`."""
_START = "0"


def interpolate_models(
    config: InterpolateConfig,
    start: Path,
    end: Path,
    evaluate: Evaluate,
    judged: Sequence[str],
    out: Path,
    report: Report,
) -> Made:
    """Write `model/`, the best of the config's weights between two saved models (the start is
    resized to the end's architecture), and `choice.json` into `out`. The figure is the mean of the
    metrics that are `judged` over `choose_on`. InputError: the models do not fit each other; every
    weight loses too much."""
    folders: dict[str, Path] = {}
    for weight in sorted({0.0, *config.weights}):
        report(len(folders), len(config.weights) + 1, f"weight {weight:g}")
        folders[f"{weight:g}"] = out / "candidates" / f"{weight:g}"
        save_model(interpolate_weights(start, end, weight), folders[f"{weight:g}"])
    results = evaluate(folders, out / "evaluation")
    means = {
        name: fmean(
            fmean(figures[name][metric] for metric in figures[name] if metric in judged)
            for figures in (results["results"][one] for one in config.choose_on)
        )
        for name in folders
    }
    lost = {name: find_losses(results, name, config, judged) for name in folders}
    chosen = choose_weight(config, means, lost)
    model = out / MODEL_FOLDER
    shutil.rmtree(model, ignore_errors=True)
    folders[chosen].rename(model)
    rows = {
        name: {"mean": means[name], "lost": lost[name], "figures": _figures_of(results, name)}
        for name in folders
    }
    write_atomically(out / CHOICE, json.dumps({"weight": float(chosen), "weights": rows}, indent=1))
    for folder in ("candidates", "evaluation"):
        shutil.rmtree(out / folder, ignore_errors=True)
    counts = {"weight": float(chosen), **{f"weight.{name}.mean": means[name] for name in folders}}
    return Made(counts, (*sorted(model.iterdir()), out / CHOICE))


def choose_weight(
    config: InterpolateConfig, means: Mapping[str, float], lost: Mapping[str, Sequence[str]]
) -> str:
    """The weight of the best mean among those that lose nothing much; of equal ones the lowest."""
    names = [f"{weight:g}" for weight in sorted(config.weights)]
    fit = [name for name in names if not lost[name]]
    if not fit:
        raise InputError(
            f"every weight of [interpolate] loses more than max_loss_points on "
            f"{', '.join(lost[names[0]])}: add lower ones to interpolate.weights, such as 0.1, or "
            "0 for the start itself"
        )
    return max(fit, key=lambda name: means[name])


def find_losses(
    results: Mapping[str, Any], name: str, config: InterpolateConfig, judged: Sequence[str]
) -> list[str]:
    """SET.METRIC of every figure that a weight makes too much worse than the start has it."""
    return [
        f"{one}.{metric}"
        for one in config.keep_on
        for metric, value in results["results"][one][_START].items()
        if metric in judged
        and 100 * (value - results["results"][one][name][metric]) > config.max_loss_points
    ]


def _figures_of(results: Mapping[str, Any], name: str) -> dict[str, float]:
    return {
        f"{one}.{metric}": value
        for one, by_model in results["results"].items()
        for metric, value in by_model[name].items()
        if isinstance(value, float)
    }
