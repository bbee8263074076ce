"""Metrics of a user's own: Python files that a recipe names, whose content its digest includes.

A file defines `METRICS`, a list of `HitShare`, `SampleMean`, `ClassMean` or another `SampleMetric`
of metric.py, each with a value for every question of a set.
"""

import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaclip_model.errors import InputError, shorten_error
from evaclip_model.zeroshot.statistics import Ties
from tasks.evaluate.metrics.metric import METRICS, SampleMetric
from tasks.evaluate.metrics.scored import Scored

NAME = "METRICS"


def load_metrics(files: Sequence[str]) -> tuple[SampleMetric, ...]:
    """The metrics that Python files define; InputError, in one sentence, where a file raises,
    defines no metrics, or one with a name that is taken."""
    found: list[SampleMetric] = []
    for path in map(Path, files):
        try:
            defined = runpy.run_path(str(path)).get(NAME)
        except Exception as error:  # whatever the user's code raises
            raise InputError(f"{path} cannot be run: {_name_error(error)}") from error
        if not isinstance(defined, Sequence) or not defined:
            raise InputError(f"{path} defines no {NAME}: a list of metrics is expected")
        for metric in defined:
            if not isinstance(metric, SampleMetric):
                raise InputError(
                    f"{path}: {NAME} holds {metric!r:.60}, not a metric with a value for each "
                    "sample (HitShare, SampleMean or ClassMean of tasks.evaluate.metrics.metric)"
                )
            if metric.name in {one.name for one in (*METRICS, *found)}:
                raise InputError(f"{path}: there is a metric '{metric.name}': give another name")
            found.append(_guard_metric(metric, path))
    return tuple(found)


def _guard_metric(metric: SampleMetric, path: Path) -> SampleMetric:
    """The metric, whose values are looked at before anything is made of them."""
    given = metric.per_sample

    def compute_values(scored: Scored, ties: Ties) -> Tensor:
        evalset = scored.evalset
        where = f"{path}: metric '{metric.name}' on set '{evalset.name}'"
        try:
            values: Any = given(scored, ties)
        except Exception as error:  # whatever the user's code raises
            raise InputError(f"{where} raises {_name_error(error)}") from error
        asked = len(evalset.questions or evalset.captions) or len(evalset)
        sizes = dict.fromkeys([len(evalset), asked])
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if shape not in [(size,) for size in sizes]:
            wanted = " or ".join(f"[{size}]" for size in sizes)
            raise InputError(f"{where} returns {shape}, not a tensor {wanted}: a value a question")
        if not torch.isfinite(values.double()).all():
            raise InputError(f"{where} returns values that are not finite")
        return torch.as_tensor(values)

    return replace(metric, per_sample=compute_values)


def _name_error(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten_error(error)}"
