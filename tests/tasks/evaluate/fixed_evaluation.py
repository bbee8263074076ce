"""One small evaluation whose every answer is fixed: what the golden files of the report hold.

Covers: four of the paper's sets, one of each kind and metric, and a set of the user's own with
ties, a class without images and names in a wrong order; two models, one training stage.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaclip_model.zeroshot.exact_ranks import rank_targets
from tasks.encoders.open_models import Identity
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.results import results_of
from tasks.evaluate.sets.published_layout import EvalSample, EvalSet
from tests.tasks.evaluate.made_up import made_up

KEYS = ("cifar10", "kinetics400", "flickr30k", "voc2007-multilabel")
OWN = "mine"


def fixed_evaluation(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Scored]], Path]:
    """results.json's content, the answers behind it, and the metrics.jsonl of a training stage."""
    _, scored = made_up(folder, KEYS, images_per_class=1)
    scored[OWN] = _own_set(scored["cifar10"]["candidate"].evalset)
    sets = {key: by_model["candidate"].evalset for key, by_model in scored.items()}
    config = EvaluateConfig.from_mapping(
        {
            "title": "A fixed evaluation",
            "sets": [
                *({"name": key} for key in KEYS),
                {"name": OWN, "folder": "own", "kind": "classification", "split": "all of it"},
                {"name": "mnist"},
            ],
        },
        where="here",
    )
    seen = {
        key: np.arange(len(sets[key])) % 20 == 0 for key in ("cifar10", "flickr30k", "kinetics400")
    }
    failed = {"mnist": "0.tar: image s0000007: cannot be decoded"}
    results = results_of(
        config,
        {
            "candidate": _identity("0", "open_clip:EVA02-B-16/merged2b_s8b_b131k"),
            "champion": _identity("1", "runs/champion"),
        },
        sets,
        scored,
        failed,
        seen,
    )
    results["versions"] = {"torch": "any"}
    return results, scored, _stage(folder / "train")


def _own_set(like: EvalSet) -> dict[str, Scored]:
    """Seven classes, one of them without an image; many answers tie, two classes are swapped."""
    draw = random.Random(7)
    labels = [number % 6 for number in range(90)]
    samples = tuple(
        EvalSample(f"s{n:07d}", like.samples[n % len(like)].image, label)
        for n, label in enumerate(labels)
    )
    names = ("cat", "dog", "fox", "owl", "rat", "yak", "a | b")
    evalset = EvalSet(OWN, "classification", samples, names, ("a {c}.",), "f" * 16)
    scored = {}
    for model in ("candidate", "champion"):
        logits = torch.zeros(len(labels), len(names))
        for row, label in enumerate(labels):
            said = {0: 1, 1: 0}.get(label, label)
            logits[row, said if draw.random() < 0.8 else draw.randrange(7)] = 1
            if draw.random() < 0.3:
                logits[row, draw.randrange(7)] = 1
        scored[model] = Scored(evalset, classes=rank_targets(logits, torch.tensor(labels), 8))
    return scored


def _identity(digit: str, source: str) -> Identity:
    return Identity(
        digest=digit * 16,
        text_digest="2" * 16,
        transform_digest="3" * 16,
        architecture="EVA02-CLIP-B-16 at 224 px",
        params=149_690_000,
        gflops=35.1,
        source=source,
        preprocessing={"image_px": 224, "mean": [0.48145466, 0.4578275, 0.40821073]},
    )


def _stage(folder: Path) -> Path:
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps({"train": {"name": "first light"}}))
    steps = (
        {"step": n, "samples": 8 * n, "loss": 3 / n, "step_s": 0.5, "images_per_second": 16}
        | {"logit_scale": 14.5}
        for n in range(1, 30)
    )
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)) + "\n")
    return folder / "metrics.jsonl"
