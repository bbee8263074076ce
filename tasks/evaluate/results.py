"""The content of `results.json`: every figure, with the data and settings behind it."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from statistics import fmean
from typing import Any

from tasks.encoders.open_models import Identity, digest_of
from tasks.evaluate.config import STAGE, EvaluateConfig
from tasks.evaluate.encode.encode_features import texts_of
from tasks.evaluate.metrics import compute
from tasks.evaluate.metrics.metric import metrics_in
from tasks.evaluate.metrics.scored import Scored
from tasks.evaluate.paper import published
from tasks.evaluate.sets.published_layout import EvalSet
from tasks.evaluate.sets.set_registry import DATACOMP, find_set, known_sets, sets_of_group

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
    seen: Mapping[str, compute.Mask],
) -> dict[str, Any]:
    """Everything `results.json` holds; sets that failed have only a reason.

    The first of `models` is the subject, which the others are compared with. `scored` is set ->
    model -> answers, `failed` set -> reason, `seen` set -> mask of the images that the subject was
    trained on, of some sets or none.
    """
    subject = next(iter(models))
    splits = {one.name: one.split for one in config.sets}
    whole = {name: one for name, one in sets.items() if name in scored}
    results = {
        name: {
            model: {**compute.compute_figures(one), "cut": one.cut}
            for model, one in by_model.items()
        }
        for name, by_model in scored.items()
    }
    chance = {name: compute.chance_levels(one) for name, one in whole.items()}
    rows = {
        name: published.paper_model(one.source, one.architecture, one.sha256, config.released)
        for name, one in models.items()
    }
    return {
        "title": config.title,
        "subject": subject,
        "models": {
            name: {
                **one.model_dump(mode="json"),
                "precision": config.precision,
                "paper": asdict(row) if (row := rows[name]) else None,
            }
            for name, one in models.items()
        },
        "sets": {
            name: {
                **_describe_set(one, splits[name]),
                "warnings": [
                    *warnings_of(one, scored[name][subject], results[name][subject], chance[name]),
                    *_list_cut(one, scored[name]),
                ],
            }
            for name, one in whole.items()
        },
        "results": results,
        "own_metrics": {one.name: one.title for each in whole.values() for one in each.own_metrics},
        "chance": chance,
        "paper": {
            name: _paper_figures(one, results[name], rows, splits[name])
            for name, one in whole.items()
        },
        "paired": {
            name: {
                model: {
                    metric: asdict(one)
                    for metric, one in compute.compare_models(by_model[subject], other).items()
                }
                for model, other in by_model.items()
                if model != subject
            }
            for name, by_model in scored.items()
        },
        "averages": _table_averages(results, rows),
        "contamination": {
            name: {
                "flagged": int(mask.sum()),
                "figures_without": compute.figures_without(scored[name][subject], mask),
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
    subject = results["subject"]
    for name, by_model in results["results"].items():
        for model, figures in by_model.items():
            prefix = name if model == subject else f"{name}.{model}"
            own = [name for name in results["own_metrics"] if name in figures]
            for metric in [*(one.name for one in metrics_in(figures)), *own]:
                counts[f"{prefix}.{metric}"] = figures[metric]
        counts[f"{name}.n"] = results["sets"][name]["n"]
        chance = results["chance"][name].items()
        counts |= {f"{name}.chance.{metric}": value for metric, value in chance}
    for table, by_model in results["averages"].items():
        if (percent := by_model[subject]["value"]) is not None:
            counts[f"average.{table}"] = percent / 100
    verdicts = Counter(
        f"paper.{one['verdict'].replace(' ', '_')}"
        for by_model in results["paper"].values()
        for one in by_model.get(subject, {}).values()
    )
    return {**counts, **verdicts}


def prompts_digest(evalset: EvalSet) -> str:
    """16 hex digits over the class names and templates, or the captions, that were encoded."""
    return digest_of([evalset.classnames, evalset.templates, evalset.captions])


def _describe_set(evalset: EvalSet, split: str) -> dict[str, Any]:
    known, train = evalset.known, evalset.train
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
        **({"train": {"n": len(train), "images_digest": train.images_digest}} if train else {}),
    }


def _paper_figures(
    evalset: EvalSet,
    results: Mapping[str, compute.Figures],
    rows: Mapping[str, published.PaperModel | None],
    split: str,
) -> dict[str, dict[str, Any]]:
    """Model -> metric -> the figure that the paper prints, and how ours stands to it."""
    found: dict[str, dict[str, Any]] = {}
    for name, figures in results.items():
        if (model := rows[name]) is None:
            continue
        for metric in metrics_in(figures):
            if (
                reference := published.find_published(model.row, evalset.name, metric.name)
            ) is None:
                continue
            ruling = published.judge_figure(
                figures[metric.name], reference, evalset, model, split=split
            )
            found.setdefault(name, {})[metric.name] = {
                "published": reference.value / 100,
                "tolerance": reference.tolerance,
                "row": model.row,
                **ruling._asdict(),
                "errata": list(reference.errata),
            }
    return found


def _table_averages(
    results: Mapping[str, Mapping[str, compute.Figures]],
    rows: Mapping[str, published.PaperModel | None],
) -> dict[str, Any]:
    """Table -> model -> average, of the tables of which a set was evaluated."""
    values = {
        name: published.values_of({key: by_model[name] for key, by_model in results.items()})
        for name in rows
    }
    averages = {
        table: {
            name: asdict(published.average_table(table, values[name], row.row if row else None))
            for name, row in rows.items()
        }
        for table in published.TABLES
        if published.members_of(table).keys() & results.keys()
    }
    if results.keys() & set(sets_of_group(DATACOMP)).difference(known_sets()):
        averages[DATACOMP] = {name: asdict(_average_datacomp(results, name)) for name in rows}
    return averages


def _average_datacomp(
    results: Mapping[str, Mapping[str, compute.Figures]], model: str
) -> published.Average:
    """DataComp's average: of each of its 38 sets the figure that it calls the main one."""
    values = {}
    for key, by_model in results.items():
        figures, known = by_model[model], find_set(key)
        both = [figures[way] for way in ("image_to_text_r1", "text_to_image_r1") if way in figures]
        main = known.datacomp if known else ""
        if main == "mean_r1" and both:
            values[key] = fmean(both)
        elif main in figures:
            values[key] = figures[main]
    return published.average_sets(sets_of_group(DATACOMP), values)


TIES_WORTH_TELLING = 0.001
"""Share between the bounds under ties from which a reader is warned."""
CONSISTENT = 0.5
"""Share of a class's images that get one wrong answer, from which the answer is that class's."""
PERMUTED = 0.3
"""Share of classes with such an answer, from which the order of names is doubted."""
FEWEST_PERMUTED = 2


def warnings_of(
    evalset: EvalSet, scored: Scored, figures: Mapping[str, Any], chance: Mapping[str, float]
) -> list[str]:
    """Sentences about one set and the model that is evaluated."""
    found = list(evalset.warnings)
    if duplicates := len(evalset.classnames) - len(set(evalset.classnames)):
        found.append(f"{duplicates} class names occur more than once: their images tie exactly")
    if evalset.kind == "classification":
        if absent := len(evalset.classnames) - len({sample.label for sample in evalset.samples}):
            found.append(f"{absent} of {len(evalset.classnames)} classes have no image")
        if swapped := permuted_classes(evalset, scored):
            true, said = next(iter(swapped.items()))
            found.append(
                f"{len(swapped)} classes are answered by another class each, as if names and "
                f"labels were in different orders: most images labelled '{true}' are called "
                f"'{said}'"
            )
    for metric, (lost, won) in figures["bounds"].items():
        if won - lost > TIES_WORTH_TELLING:
            found.append(
                f"ties decide {metric}: {100 * lost:.1f} % if all were lost, "
                f"{100 * won:.1f} % if all were won"
            )
    for metric, (low, _) in figures["intervals"].items():
        if metric in chance and low <= chance[metric] < 1:  # all answers are right where it is 1
            found.append(f"{metric} is not above chance within its 95 % interval")
    return found


def _list_cut(evalset: EvalSet, scored: Mapping[str, Scored]) -> Iterator[str]:
    """Sentences on models whose context is too short for some texts of a set."""
    captions = len(evalset.captions)
    texts = f"{captions:,} captions" if captions else f"{len(texts_of(evalset)):,} prompts"
    for model, one in scored.items():
        if one.cut:
            yield f"{model} does not see the end of {one.cut:,} of {texts}: its context is shorter"


def permuted_classes(evalset: EvalSet, scored: Scored) -> dict[str, str]:
    """Class -> the other class that most of its images are called, where such pairs are many and
    no two classes share one: a model that knows the classes and a list in the wrong order."""
    if scored.classes is None:
        return {}
    answers: defaultdict[int, Counter[int]] = defaultdict(Counter)
    names, given = evalset.classnames, scored.classes.top[:, 0].tolist()
    for sample, answer in zip(evalset.samples, given, strict=True):
        answers[sample.label][answer] += 1
    wrong = {
        label: answer
        for label, counted in answers.items()
        for answer, times in counted.most_common(1)
        if times >= CONSISTENT * counted.total() and names[answer] != names[label]
    }
    claimed = Counter(wrong.values())
    pairs = {label: answer for label, answer in wrong.items() if claimed[answer] == 1}
    if len(pairs) < max(FEWEST_PERMUTED, PERMUTED * len(answers)):
        return {}
    return {names[label]: names[said] for label, said in pairs.items()}
