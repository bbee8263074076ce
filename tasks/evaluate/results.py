"""The content of `results.json`: every figure, with the data and settings behind it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

from tasks.evaluate.config import STAGE, EvaluateConfig
from tasks.evaluate.encode.model_identity import Identity
from tasks.evaluate.metrics.compute import Figures, chance_levels, compare_models, compute_figures
from tasks.evaluate.metrics.contamination import Mask, figures_without
from tasks.evaluate.metrics.metric import metrics_in
from tasks.evaluate.metrics.sanity_warnings import warnings_of
from tasks.evaluate.metrics.scored import Scored, captions_of
from tasks.evaluate.paper.averages import (
    ROBUSTNESS,
    TABLES,
    average_table,
    members_of,
    robustness_gap,
    values_of,
)
from tasks.evaluate.paper.published import PaperModel, find_published, judge_figure, paper_model
from tasks.evaluate.sets.published_layout import EvalSet

RULE = (
    "rank = answers with a strictly larger fp32 cosine + equal ones with a lower index; "
    "hit@k = rank < k; every sample of a set's index is evaluated exactly once"
)


def results_of(
    config: EvaluateConfig,
    models: Mapping[str, Identity],
    sets: Mapping[str, EvalSet],
    scored: Mapping[str, Mapping[str, Scored]],
    failed: Mapping[str, str],
    seen: Mapping[str, Mask],
) -> dict[str, Any]:
    """Everything `results.json` holds; sets that failed have only a reason.

    Args:
        config: of the evaluation.
        models: the identity of each; the first is the subject, which the others are compared with.
        sets: all of them.
        scored: set -> model -> answers, of the sets that did not fail.
        failed: set -> why it could not be evaluated.
        seen: set -> mask of the images that the subject was trained on; of some sets, or none.
    """
    subject = next(iter(models))
    splits = {one.name: one.split for one in config.sets}
    whole = {name: one for name, one in sets.items() if name in scored}
    results = {
        name: {model: compute_figures(one) for model, one in by_model.items()}
        for name, by_model in scored.items()
    }
    chance = {name: chance_levels(one) for name, one in whole.items()}
    rows = {name: paper_model(one.source, one.architecture) for name, one in models.items()}
    return {
        "title": config.title,
        "subject": subject,
        "models": {
            name: {**one.model_dump(mode="json"), "precision": config.precision}
            for name, one in models.items()
        },
        "sets": {
            name: {
                **_describe_set(one, splits[name]),
                "warnings": warnings_of(
                    one, scored[name][subject], results[name][subject], chance[name]
                ),
            }
            for name, one in whole.items()
        },
        "results": results,
        "chance": chance,
        "paper": {
            name: _paper_figures(one, results[name], rows, splits[name])
            for name, one in whole.items()
        },
        "paired": {
            name: _paired_differences(by_model, subject) for name, by_model in scored.items()
        },
        **_table_averages(results, rows),
        "contamination": {
            name: {
                "flagged": int(mask.sum()),
                "figures_without": figures_without(scored[name][subject], mask),
            }
            for name, mask in seen.items()
        },
        "failed": dict(failed),
        "rule": RULE,
        "versions": {tool: metadata.version(tool) for tool in ("evaclip", *STAGE.tools)},
    }


def counts_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Totals of the manifest: `SET.METRIC`, `SET.OTHER-MODEL.METRIC`, `SET.chance.METRIC`.

    And of the subject alone, where there is such: `average.TABLE`, a share, and how many figures
    have each verdict, `paper.reproduced`, `paper.differs`, `paper.not_comparable`.
    """
    counts: dict[str, float] = {}
    for name, by_model in results["results"].items():
        for model, figures in by_model.items():
            prefix = name if model == results["subject"] else f"{name}.{model}"
            for metric in metrics_in(figures):
                counts[f"{prefix}.{metric.name}"] = figures[metric.name]
        counts[f"{name}.n"] = results["sets"][name]["n"]
        for metric, value in results["chance"][name].items():
            counts[f"{name}.chance.{metric}"] = value
    subject = results["subject"]
    for table, by_model in results["averages"].items():
        if by_model[subject]["value"] is not None:
            counts[f"average.{table}"] = by_model[subject]["value"] / 100
    verdicts = Counter(
        one["verdict"].replace(" ", "_")
        for by_model in results["paper"].values()
        for one in by_model.get(subject, {}).values()
    )
    return {**counts, **{f"paper.{verdict}": times for verdict, times in verdicts.items()}}


def prompts_digest(evalset: EvalSet) -> str:
    """16 hex digits over the class names and templates, or the captions, that were encoded."""
    texts = [list(evalset.classnames), list(evalset.templates), captions_of(evalset)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _describe_set(evalset: EvalSet, split: str) -> dict[str, Any]:
    known = evalset.known
    return {
        "kind": evalset.kind,
        "metric": known.metric if known else None,
        "n": len(evalset),
        "expected_n": known.n if known else None,
        "classes": len(evalset.classnames) or None,
        "split": split or (known.split if known else None),
        "fingerprint": evalset.fingerprint,
        "images_digest": evalset.images_digest,
        "crop_px": evalset.crop_px,
        "templates": list(evalset.templates),
        "prompts_source": evalset.prompts_source,
        "prompts_digest": prompts_digest(evalset),
    }


def _paper_figures(
    evalset: EvalSet,
    results: Mapping[str, Figures],
    rows: Mapping[str, PaperModel | None],
    split: str,
) -> dict[str, dict[str, Any]]:
    """Model -> metric -> the figure that the paper prints, and how ours stands to it."""
    found: dict[str, dict[str, Any]] = {}
    for name, figures in results.items():
        model = rows[name]
        for metric in metrics_in(figures) if model else ():
            assert model is not None
            reference = find_published(model.row, evalset.name, metric.name)
            if reference is None:
                continue
            ruling = judge_figure(figures[metric.name], reference, evalset, model, split=split)
            found.setdefault(name, {})[metric.name] = {
                "published": reference.value / 100,
                "tolerance": reference.tolerance,
                "row": model.row,
                "verdict": ruling.verdict,
                "reason": ruling.reason,
                "errata": list(reference.errata),
            }
    return found


def _paired_differences(by_model: Mapping[str, Scored], subject: str) -> dict[str, dict[str, Any]]:
    pairs = {
        name: compare_models(by_model[subject], other)
        for name, other in by_model.items()
        if name != subject
    }
    return {
        name: {metric: asdict(one) for metric, one in found.items()}
        for name, found in pairs.items()
    }


def _table_averages(
    results: Mapping[str, Mapping[str, Figures]], rows: Mapping[str, PaperModel | None]
) -> dict[str, Any]:
    """The parts `averages` (table -> model -> average) and `robustness` (model -> gap) of tables of
    which a set was evaluated."""
    values = {
        name: values_of({key: by_model[name] for key, by_model in results.items()}) for name in rows
    }
    beside = {name: row.row if row else None for name, row in rows.items()}
    tables = [table for table in TABLES if members_of(table).keys() & results.keys()]
    return {
        "averages": {
            table: {name: asdict(average_table(table, values[name], beside[name])) for name in rows}
            for table in tables
        },
        "robustness": {
            name: asdict(robustness_gap(values[name], beside[name]))
            for name in rows
            if ROBUSTNESS in tables
        },
    }
