"""Evaluate models on every set of a recipe, side by side, and write results and reports.

The first model given is the one evaluated; the others (untrained, an older champion) stand beside
it for comparison. Features are made first, of everything; the rest takes seconds.

`answers.parquet` has a row for each model's answer to each question, sets and models one after the
other; `docs/evaluate.md` says what its columns are.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet
from torch import Tensor

from evaclip_model.errors import InputError
from evaclip_model.files import replace_file, write_atomically
from evaclip_model.zeroshot.exact_ranks import ROWS, top_k
from tasks.artifacts.artifact import Made
from tasks.encoders.open_models import Identity, identify_model
from tasks.evaluate.config import ANSWERS, RESULTS, EvaluateConfig, EvaluationMachine
from tasks.evaluate.encode.distributed import Features
from tasks.evaluate.encode.encode_features import Cache, answer_features, texts_of
from tasks.evaluate.metrics.compute import TrainingData, hash_set, load_metrics, seen_in_training
from tasks.evaluate.metrics.probes import LabelledFeatures, ProbeAnswers, answer_probes
from tasks.evaluate.metrics.scored import SHOWN, Scored, image_of_caption, labels_of, score_set
from tasks.evaluate.report.charts import read_curve
from tasks.evaluate.report.write_reports import write_reports
from tasks.evaluate.results import counts_of, results_of
from tasks.evaluate.sets.published_layout import EvalSet, open_set, open_train_part
from tasks.evaluate.sets.set_registry import find_set
from tasks.progress import Report

WriteAnswers = Callable[[str, Scored, Tensor, Tensor], None]
"""Called with the model's name, its answers, its features of images [N, D], and of what can be
answered [A, D]."""
SCHEMA = pyarrow.schema(
    {
        **{name: pyarrow.string() for name in ("set", "model", "direction", "key", "query")},
        **{"label": pyarrow.list_(pyarrow.int32()), "rank": pyarrow.int32()},
        **{"answers": pyarrow.list_(pyarrow.int32()), "names": pyarrow.list_(pyarrow.string())},
        "scores": pyarrow.list_(pyarrow.float32()),
    }
)
_ROWS_AT_ONCE = 100_000
_JOB = "job"
"""Folder of the job and the logs of the ranks."""
_OWN_CACHE = "features"
"""Folder of an evaluation that keeps its features nowhere else."""


def evaluate_models(
    config: EvaluateConfig,
    models: Mapping[str, str | Path],
    sets: Mapping[str, Path],
    curves: Sequence[Path],
    out: Path,
    report: Report,
    *,
    machine: EvaluationMachine | None = None,
    trained_on: Sequence[TrainingData] = (),
    lineage: str = "",
    search: str = "",
) -> Made:
    """Evaluate models (name -> specification) on sets (name -> folder); write results and reports.

    A set with an image that cannot be decoded fails alone: the others are evaluated and reported,
    then the failure is raised, and a repeat finds their features kept.

    Args:
        models: the first is the one evaluated.
        curves: the `metrics.jsonl` of the training stages, in order.
        trained_on: the data of the model evaluated, to tell which test images it has seen.
        lineage: the artifacts behind that model, as an SVG for the page.
        search: address of the search among what it may have learnt from, where there is one.
    """
    machine = machine or EvaluationMachine()
    cache = Cache(machine.cache or out / _OWN_CACHE, int(machine.cache_gb * 1e9))
    opened = _open_sets(config, sets, cache.root / "indices")
    trained = [read_curve(path) for path in curves]
    specs = {name: str(one) for name, one in models.items()}
    identities = {name: identify_model(one) for name, one in specs.items()}
    parts = {one.train.name: one.train for one in opened.values() if one.train}
    features = Features(cache, machine, config.precision, specs, identities, opened | parts)
    features.compute_missing(out / _JOB, report)
    if opened.keys() <= features.failed.keys():
        _require_all(features.failed, "there are no others")
    with write_answers(out / ANSWERS) as write:
        scored = _score_all(features, identities, opened, config, report, write)
    opened |= {name: next(iter(by_model.values())).evalset for name, by_model in scored.items()}
    hashes = {
        name: hash_set(opened[name], cache.open_folder("hashes", opened[name].images_digest))
        for name in (scored if trained_on else ())
    }
    seen = seen_in_training(hashes, trained_on, config.max_distance, report) if hashes else {}
    results = results_of(config, identities, opened, scored, features.failed, seen)
    write_atomically(out / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    written = write_reports(out, results, scored, trained, lineage, search)
    _require_all(features.failed, f"the others are in {out}")
    if machine.cache is None:
        shutil.rmtree(cache.root)
    else:
        cache.remove_oldest()
    return Made(counts_of(results), (out / RESULTS, out / ANSWERS, *written))


def _open_sets(
    config: EvaluateConfig, sets: Mapping[str, Path], index_cache: Path
) -> dict[str, EvalSet]:
    opened = {}
    own = load_metrics(config.metrics)
    for one in config.sets:
        evalset = open_set(
            one.name,
            sets[one.name],
            one.kind,
            one.templates,
            known=find_set(one.name),
            classnames=one.classnames,
            index_cache=index_cache,
            crop_px=one.crop_px,
        )
        if config.probes:
            train = open_train_part(evalset, sets[one.name], index_cache)
            figures = config.probe_figures if train else ()
            evalset = replace(evalset, train=train, probes=figures)
        opened[one.name] = replace(evalset, own_metrics=own)
    if config.probes and not any(one.train for one in opened.values()):
        raise InputError(
            f"no set has a train part for the probes {', '.join(config.probes)}: expected a folder "
            f"'train' in a classification set's, as in {next(iter(sets.values())) / 'train'}"
        )
    return opened


def _score_all(
    features: Features,
    models: Mapping[str, Identity],
    sets: Mapping[str, EvalSet],
    config: EvaluateConfig,
    report: Report,
    write: WriteAnswers,
) -> dict[str, dict[str, Scored]]:
    whole = {name: one for name, one in sets.items() if name not in features.failed}
    scored: dict[str, dict[str, Scored]] = {name: {} for name in whole}
    asked = sum(bool(one.train) for one in whole.values()) * len(models)
    done = 0
    for model in models:
        texts = features.text_features(model)
        for name, evalset in whole.items():
            images = features.image_features(model, name)
            probed: dict[str, ProbeAnswers] = {}
            if evalset.train and evalset.train.name in features.failed:
                evalset = replace(evalset, train=None, probes=())
            if evalset.train:
                report(done, asked, f"probes of {model} on {name}")
                train = features.image_features(model, evalset.train.name)
                probed = answer_probes(
                    LabelledFeatures(train, labels_of(evalset.train), features.machine.device),
                    LabelledFeatures(images, labels_of(evalset)),
                    len(evalset.classnames),
                    evalset.probes,
                    config.probe,
                )
                done += 1
            answers = answer_features(evalset, texts)
            cut = texts.count_cut(evalset.captions or texts_of(evalset))
            one = replace(score_set(evalset, images, answers), probes=probed, cut=cut)
            write(model, one, images, answers)
            scored[name][model] = one
    return scored


def _require_all(failed: Mapping[str, str], others: str) -> None:
    if failed:
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in failed.items())
        raise InputError(
            f"{len(failed)} evaluation {'set' if len(failed) == 1 else 'sets'} could not be "
            f"evaluated ({reasons}); {others}"
        )


@contextmanager
def write_answers(path: Path) -> Iterator[WriteAnswers]:
    """Yield what adds a model's answers to a set; the file is there when all are written."""
    with replace_file(path) as beside, parquet.ParquetWriter(beside, SCHEMA) as file:

        def write(model: str, scored: Scored, images: Tensor, answers: Tensor) -> None:
            about = {"set": scored.evalset.name, "model": model}
            rows = chain(_list_answers(scored, images, answers), _list_choices(scored))
            while found := [about | row for row in islice(rows, _ROWS_AT_ONCE)]:
                file.write_table(pyarrow.Table.from_pylist(found, SCHEMA))

        yield write


def _list_choices(scored: Scored) -> Iterator[dict[str, Any]]:
    """A row for each image of a choice set's questions, or for each text where images are chosen;
    the answers are those of the question, the nearest first."""
    if scored.similarities is None:
        return
    number = {sample.key: place for place, sample in enumerate(scored.evalset.samples)}
    first = 0
    for question, cosines in zip(scored.evalset.questions, scored.similarities, strict=True):
        texts = range(first, first := first + len(question.texts))
        images = [number[key] for key in question.images]
        chooses = question.form == "images"
        names, numbers = (question.images, images) if chooses else (question.texts, texts)
        asked = question.texts if chooses else question.images
        for place, values in enumerate((cosines.T if chooses else cosines).tolist()):
            own = [pair[not chooses] for pair in question.pairs if pair[chooses] == place]
            order = sorted(range(len(values)), key=lambda one: -values[one])
            yield {
                "direction": "text → image" if chooses else "image → text",
                "key": question.images[own[0]] if chooses else asked[place],
                "query": asked[place] if chooses else None,
                "label": [numbers[one] for one in own],
                "rank": min(order.index(one) for one in own) if own else None,
                "answers": [numbers[one] for one in order],
                "names": [names[one] for one in order],
                "scores": [values[one] for one in order],
            }


def _list_answers(scored: Scored, images: Tensor, answers: Tensor) -> Iterator[dict[str, Any]]:
    """A row for each question of each direction in which a set asks."""
    samples, captions = scored.evalset.samples, scored.evalset.captions
    keys, owner = [one.key for one in samples], image_of_caption(scored.evalset).tolist()
    labels = [[*one.labels] or [one.label] for one in samples]
    if scored.scores is not None:  # an image may show none
        labels = [[*one.labels] for one in samples]
    if captions:
        labels = [[] for _ in samples]
        for caption, image in enumerate(owner):
            labels[image].append(caption)
    found = {
        name: (one.top, one.ranks.tolist()) for name, one in scored.rankings_by_direction().items()
    }
    if scored.scores is not None:
        found["image → class"] = top_k(scored.scores, SHOWN), [None] * len(samples)
    for direction, (top, ranks) in found.items():
        names, asked, gallery = captions or scored.evalset.classnames, images, answers
        about = {"key": keys, "query": [None] * len(keys), "label": labels}
        if direction.startswith("text"):
            names, asked, gallery = keys, answers, images
            about = {"key": [keys[one] for one in owner], "query": captions}
            about["label"] = [[one] for one in owner]
        parts = [
            torch.einsum("qd,qkd->qk", asked[rows].float(), gallery[top[rows]].float())
            for rows in torch.split(torch.arange(len(top)), ROWS)
        ]
        columns = about | {
            "direction": [direction] * len(top),
            "rank": ranks,
            "answers": top.tolist(),
            "names": [[names[answer] for answer in row] for row in top.tolist()],
            "scores": torch.cat(parts).tolist(),
        }
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))
