"""Made-up evaluations of the paper's sets, without a model: what a report is made of.

Covers: results.json with every part, and the rankings behind it, for any of the 33 sets.
Figures lie near those the paper prints for a model; only a few images a class are made.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from evaclip_model.zeroshot.exact_ranks import Ranking
from evaclip_model.zeroshot.set_layout import Span
from tasks.evaluate.metrics.compute import chance_levels, compare_models, compute_figures
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.paper.published import (
    TABLES,
    PaperModel,
    average_table,
    find_published,
    judge_figure,
    values_of,
)
from tasks.evaluate.sets.published_layout import EvalSample, EvalSet
from tasks.evaluate.sets.set_registry import KnownSet, find_set

ROW = "EVA-02-CLIP-B/16"
"""Model of the paper that the made-up ones are near."""
PICTURES = 24
CAPTIONS = ("a small dog", "two boats at sea", "a street in the rain", "bread on a table", "a cat")
SHOWN = 8


def made_up(
    folder: Path,
    keys: Sequence[str],
    *,
    images_per_class: int = 3,
    failed: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Scored]]]:
    """results.json's content and the rankings of two models on the sets `keys`."""
    tar = _pictures(folder / "pictures.tar")
    models = {"candidate": 0.0, "champion": -0.02}
    opened = {key: _set(key, tar, images_per_class) for key in keys}
    scored = {
        key: {name: _scored(one, shift) for name, shift in models.items()}
        for key, one in opened.items()
    }
    figures = {
        key: {name: compute_figures(one) for name, one in by_model.items()}
        for key, by_model in scored.items()
    }
    values = {
        name: values_of({key: by_model[name] for key, by_model in figures.items()})
        for name in models
    }
    sets = {key: by_model["candidate"].evalset for key, by_model in scored.items()}
    results = {
        "title": "Made-up evaluation",
        "subject": "candidate",
        "models": {name: _about(name) for name in models},
        "sets": {key: _about_set(one) for key, one in sets.items()},
        "results": figures,
        "chance": {key: chance_levels(one) for key, one in sets.items()},
        "paired": {
            key: {
                "champion": {
                    metric: asdict(one)
                    for metric, one in compare_models(by["candidate"], by["champion"]).items()
                }
            }
            for key, by in scored.items()
        },
        "paper": {key: {"candidate": _paper(sets[key], figures[key]["candidate"])} for key in keys},
        "averages": {
            table: {name: asdict(average_table(table, values[name], ROW)) for name in models}
            for table in TABLES
        },
        "contamination": {
            key: {
                "flagged": len(sets[key]) // 40,
                "figures_without": {
                    metric: figures[key]["candidate"][metric] - 0.004
                    for metric in chance_levels(sets[key])
                },
            }
            for key in keys[:3]
        },
        "failed": dict(failed or {}),
        "rule": "rank = answers with a strictly larger logit + equal ones with a lower index",
        "versions": {"torch": "2.13.0"},
    }
    return results, scored


def _about(name: str) -> dict[str, Any]:
    return {
        "digest": f"{random.Random(name).getrandbits(64):016x}",
        "text_digest": "0123456789abcdef",
        "transform_digest": "fedcba9876543210",
        "architecture": "EVA02-CLIP-B-16 at 224 px",
        "params": 149_690_000,
        "gflops": 35.1,
        "source": "weights.pt:EVA02-CLIP-B-16" if name == "candidate" else name,
        "paper": {"row": ROW, "is_released": name == "candidate"},
        "preprocessing": {"resize": "shortest", "image_px": 224, "mean": [0.48, 0.46, 0.41]},
        "warnings": [],
    }


def _about_set(evalset: EvalSet) -> dict[str, Any]:
    known = evalset.known
    assert known is not None
    return {
        "kind": evalset.kind,
        "metric": known.metric,
        "n": len(evalset),
        "expected_n": known.n,
        "classes": len(evalset.classnames) or None,
        "split": known.split,
        "fingerprint": evalset.fingerprint,
        "templates": list(evalset.templates),
        "prompts_source": evalset.prompts_source,
        "prompts_digest": "00112233aabbccdd",
        "warnings": [f"{known.n:,} images were expected"] if known.n and known.n > 40_000 else [],
    }


def _set(key: str, tar: dict[int, Span], images_per_class: int) -> EvalSet:
    known = find_set(key)
    assert known is not None
    names = tuple(f"{known.title} class {index}" for index in range(known.classes or 0))
    if known.kind == "retrieval":
        samples = tuple(
            EvalSample(f"s{i}", tar[i % PICTURES], captions=tuple(f"{c} {i}" for c in CAPTIONS))
            for i in range(60)
        )
    else:
        samples = tuple(
            EvalSample(
                f"s{index}",
                tar[index % PICTURES],
                label=index % len(names) if known.kind == "classification" else -1,
                labels=(index % len(names), (index * 7) % len(names))
                if known.kind == "multilabel"
                else (),
            )
            for index in range(max(40, images_per_class * len(names)))
        )
    templates = ("a photo of a {c}.", "a {c}.", "art of the {c}.", "the {c}.", "my {c}.")
    fingerprint = f"{random.Random(key).getrandbits(64):016x}"
    return EvalSet(
        key, known.kind, samples, names, templates if names else (), fingerprint, known=known
    )


def _scored(evalset: EvalSet, shift: float) -> Scored:
    known = evalset.known
    assert known is not None
    if evalset.kind == "multilabel":
        scores = torch.randn(
            len(evalset), len(evalset.classnames), generator=torch.Generator().manual_seed(1)
        )
        for index, sample in enumerate(evalset.samples):
            scores[index, list(sample.labels)] += 1 + shift
        return Scored(evalset, scores=scores)
    if evalset.kind == "retrieval":
        owner = [i for i, sample in enumerate(evalset.samples) for _ in sample.captions]
        first = [owner.index(i) for i in range(len(evalset))]
        return Scored(
            evalset,
            texts=_ranking(evalset, first, len(owner), _share(known, "image_to_text_r1") + shift),
            images=_ranking(
                evalset, owner, len(evalset), _share(known, "text_to_image_r1") + shift
            ),
        )
    targets = [sample.label for sample in evalset.samples]
    share = _share(known, known.metric) + shift
    if known.metric == "kinetics_mean":
        share -= 0.12  # top-1 lies below the mean of top-1 and top-5
    return Scored(evalset, classes=_ranking(evalset, targets, len(evalset.classnames), share))


def _share(known: KnownSet, metric: str) -> float:
    reference = find_published(ROW, known.key, metric)
    assert reference is not None
    return reference.value / 100


def _ranking(evalset: EvalSet, targets: Sequence[int], answers: int, share: float) -> Ranking:
    """Right answers first about `share` of the time; the wrong one is often the next class."""
    draw = random.Random(evalset.name)
    ranks, tops = [], []
    for target in targets:
        rank = 0 if draw.random() < share else min(answers - 1, 1 + int(draw.expovariate(0.2)))
        near = [(target + step) % answers for step in (1, 2, 5, 3, 4, 6, 7, 8)]
        draw.shuffle(near)
        near = list(dict.fromkeys(one for one in [(target + 1) % answers, *near] if one != target))
        top = [*near[:rank], target, *near[rank:]]
        top += [(top[-1] + 1 + i) % answers for i in range(SHOWN)]
        ranks.append(rank)
        tops.append(top[: min(SHOWN, answers)])
    found, tied = torch.tensor(ranks), torch.zeros(len(ranks), dtype=torch.bool)
    return Ranking(found, found, found, tied, torch.tensor(tops))


def _paper(evalset: EvalSet, figures: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    assert evalset.known is not None
    known = evalset.known.model_copy(update={"n": None, "templates": None})
    whole = replace(evalset, known=known)  # as if it had its size and its prompts
    for metric, value in figures.items():
        reference = find_published(ROW, evalset.name, metric)
        if reference is None:
            continue
        ruling = judge_figure(value, reference, whole, PaperModel(ROW, True))
        found[metric] = {
            "published": reference.value / 100,
            "tolerance": reference.tolerance,
            "row": ROW,
            "verdict": ruling.verdict,
            "reason": ruling.reason,
            "errata": list(reference.errata),
        }
    return found


def _pictures(path: Path) -> dict[int, Span]:
    """Pictures of coloured shapes in one tar, by number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(5)
    with tarfile.open(path, "w") as tar:
        for index in range(PICTURES):
            image = Image.new("RGB", (96, 80), f"hsl({draw.randrange(360)}, 40%, 85%)")
            pen = ImageDraw.Draw(image)
            for _ in range(4):
                x, y, r = draw.randrange(80), draw.randrange(60), draw.randrange(8, 26)
                colour = f"hsl({draw.randrange(360)}, 70%, 50%)"
                (pen.ellipse if draw.random() < 0.5 else pen.rectangle)(
                    (x, y, x + r, y + r), fill=colour
                )
            content = io.BytesIO()
            image.save(content, "WEBP")
            member = tarfile.TarInfo(f"s{index:07d}.webp")
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)
    with tarfile.open(path) as tar:
        return {
            index: Span(path, member.offset_data, member.size) for index, member in enumerate(tar)
        }
