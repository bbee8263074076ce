"""Evaluate models on every set of a recipe, side by side, and write down what was found.

Covers: the order of work, provenance, self-checks, `results.json`; the report is made from it.
Not here: ranks (evaclip_model.zeroshot), figures, reading sets, drawing.

The first model given is the one evaluated; the others (untrained, an older champion) stand beside
it for comparison.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from evaclip_model.create import open_model
from evaclip_model.errors import InputError
from evaclip_model.model_config import CONFIG_FILE, ModelConfig, list_models
from evaclip_model.transform import image_transform
from evaclip_model.weight_files import WEIGHTS_FILE
from evaclip_model.zeroshot import TextTower, encode_texts, text_classifier
from tasks.artifact import Made, sha256_of, write_atomically
from tasks.evaluate.config import RESULTS, STAGE, EvaluateConfig
from tasks.evaluate.features import image_features
from tasks.evaluate.figures import Scored, captions_of, chance_of, figures_of, score
from tasks.evaluate.report.curves import read_curve
from tasks.evaluate.report.write import write_reports
from tasks.evaluate.sets import EvalSet, open_set
from tasks.progress import Report

TIES_WORTH_TELLING = 0.001
"""Width of the window that ties leave open, as a share, from which a reader is warned."""
RULE = (
    "rank = answers with a strictly larger fp32 cosine + equal ones with a lower index; "
    "hit@k = rank < k; every sample of a set's index is evaluated exactly once"
)


def evaluate_models(
    config: EvaluateConfig,
    models: Mapping[str, Path],
    sets: Mapping[str, Path],
    curves: Sequence[Path],
    out: Path,
    report: Report,
    *,
    workers: int = 0,
    device: str = "cpu",
) -> Made:
    """Evaluate saved models (name -> folder) on sets (name -> folder); write results and report.

    `curves` are the `metrics.jsonl` of the training stages, in order. `workers` decode images
    beside this process; neither they nor the device decide a result.

    Raises:
        InputError: a set, a model or a curve is missing or unreadable, or a model has diverged.
    """
    if not models:
        raise InputError("there is no model to evaluate")
    opened = [
        open_set(one.name, _folder_of(one.name, sets), one.kind, one.templates)
        for one in config.sets
    ]
    trained = [read_curve(path) for path in curves]
    total = len(models) * sum(len(one) + _texts_in(one) for one in opened)
    done = 0
    described: dict[str, dict[str, Any]] = {}
    scored: dict[str, dict[str, Scored]] = {one.name: {} for one in opened}
    for name, folder in models.items():
        model = open_model(folder, precision="fp32").eval().to(device)
        described[name] = describe(folder)
        transform = image_transform(model)
        for evalset in opened:
            count = _counter(report, total, f"{name} model on {evalset.name}")
            texts = _text_features(model, evalset, config.batch_size, device, partial(count, done))
            done += _texts_in(evalset)
            images = image_features(
                model,
                transform,
                evalset,
                out / "features" / f"{described[name]['digest']}-{evalset.fingerprint}",
                batch_size=config.batch_size,
                workers=workers,
                device=device,
                progress=partial(count, done),
            )
            done += len(evalset)
            scored[evalset.name][name] = score(evalset, images, texts)
    results = results_of(config.title, described, scored)
    write_atomically(out / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    reports = write_reports(out, results, scored, trained)
    shutil.rmtree(out / "features")
    return Made(counts_of(results), (out / RESULTS, *reports))


def results_of(
    title: str,
    models: Mapping[str, Mapping[str, Any]],
    scored: Mapping[str, Mapping[str, Scored]],
) -> dict[str, Any]:
    """Everything `results.json` holds: figures by set and model, and what they rest on."""
    sets = {name: next(iter(by_model.values())).evalset for name, by_model in scored.items()}
    results = {
        name: {model: figures_of(one) for model, one in by_model.items()}
        for name, by_model in scored.items()
    }
    chance = {name: chance_of(evalset) for name, evalset in sets.items()}
    return {
        "title": title,
        "subject": next(iter(models)),
        "models": {name: dict(one) for name, one in models.items()},
        "sets": {
            name: {
                "kind": one.kind,
                "n": len(one),
                "fingerprint": one.fingerprint,
                "templates": list(one.templates),
                "prompts_digest": prompts_digest(one),
                "warnings": warnings_of(one, next(iter(results[name].values())), chance[name]),
            }
            for name, one in sets.items()
        },
        "results": results,
        "chance": chance,
        "rule": RULE,
        "versions": {tool: metadata.version(tool) for tool in STAGE.tools},
    }


def counts_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Totals of the manifest: `SET.METRIC`, `SET.OTHER-MODEL.METRIC`, `SET.chance.METRIC`."""
    counts: dict[str, float] = {}
    for name, by_model in results["results"].items():
        for model, figures in by_model.items():
            prefix = name if model == results["subject"] else f"{name}.{model}"
            for metric in results["chance"][name]:
                counts[f"{prefix}.{metric}"] = figures[metric]
        counts[f"{name}.n"] = results["sets"][name]["n"]
        for metric, value in results["chance"][name].items():
            counts[f"{name}.chance.{metric}"] = value
    return counts


def describe(folder: Path) -> dict[str, Any]:
    """Digest and architecture of a saved model.

    Raises:
        InputError: the folder holds no saved model.
    """
    try:
        parts = [sha256_of(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    except FileNotFoundError as error:
        raise InputError(f"{folder} is no saved model: {error.filename} is missing") from None
    digest = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    return {"digest": digest, "architecture": architecture(ModelConfig.load(folder))}


def architecture(config: ModelConfig) -> str:
    """Name of the shipped architecture a config is, whatever its image size, and that size."""
    px = config.vision.image_px
    for name in list_models():
        shipped = ModelConfig.load(name)
        if shipped.vision.patch_px == config.vision.patch_px and shipped.at_image_px(px) == config:
            return f"{name} at {px} px"
    return f"own architecture at {px} px"


def prompts_digest(evalset: EvalSet) -> str:
    """16 hex digits over the class names and templates, or the captions, that were encoded."""
    texts = [list(evalset.classnames), list(evalset.templates), captions_of(evalset)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def warnings_of(
    evalset: EvalSet, figures: Mapping[str, Any], chance: Mapping[str, float]
) -> list[str]:
    """What a reader of the figures should know before trusting them."""
    found = []
    duplicates = len(evalset.classnames) - len(set(evalset.classnames))
    if duplicates:
        found.append(f"{duplicates} class names occur more than once: their images tie exactly")
    if evalset.kind == "classification":
        absent = len(evalset.classnames) - len({sample.label for sample in evalset.samples})
        if absent:
            found.append(f"{absent} of {len(evalset.classnames)} classes have no image")
    for metric, (lost, won) in figures["bounds"].items():
        if won - lost > TIES_WORTH_TELLING:
            found.append(
                f"ties decide {metric}: {100 * lost:.1f} % if all were lost, "
                f"{100 * won:.1f} % if all were won"
            )
    for metric, (low, _) in figures["intervals"].items():
        if low <= chance[metric]:
            found.append(f"{metric} is not above chance within its 95 % interval")
    return found


def _folder_of(name: str, sets: Mapping[str, Path]) -> Path:
    if name not in sets:
        raise InputError(f"evaluation set '{name}' has no folder: known sets are {', '.join(sets)}")
    return sets[name]


def _texts_in(evalset: EvalSet) -> int:
    if evalset.kind == "classification":
        return len(set(evalset.classnames)) * len(evalset.templates)
    return len(set(captions_of(evalset)))


def _text_features(
    model: TextTower,
    evalset: EvalSet,
    batch_size: int,
    device: str,
    progress: Callable[[int], None],
) -> Tensor:
    if evalset.kind == "classification":
        return text_classifier(
            model,
            evalset.classnames,
            evalset.templates,
            batch_size=batch_size,
            device=device,
            progress=progress,
        )
    return encode_texts(
        model, captions_of(evalset), batch_size=batch_size, device=device, progress=progress
    )


def _counter(report: Report, total: int, detail: str) -> Callable[[int, int], None]:
    """Progress of one part of the work: how much was done before it, how much of it is."""
    return lambda before, done: report(before + done, total, detail)
