"""The lines of `metrics.jsonl`: one a step, written by rank 0.

Covers: every name in them with its meaning and unit; writing them, and cutting off what a killed
run wrote beyond its newest checkpoint.
Not here: measuring (trainer.py, exchange.py); MLflow and the terminal, which read the lines.

A figure that a step has not (the trust ratios of AdamW, the MFU of an unknown device) is left out
of its line. Names stay: charts and comparisons depend on them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from evaclip_model.training.config import TrainConfig
from evaclip_model.training.cost import peak_flops
from evaclip_model.training.engine import Stepped
from evaclip_model.training.exchange import Together, is_straggler
from evaclip_model.training.guards import GuardState, Judged, Verdict

TOWERS = ("vision", "text", "other")


@dataclass(frozen=True)
class StepTimes:
    """Where the seconds of a step went, on rank 0."""

    data_wait_s: float
    """For samples."""
    prepare_s: float
    """Captions to ids, masks, and the way to the device."""
    gradient_s: float
    """Forward and backward passes and the loss, with waiting for other ranks."""
    update_s: float
    """Gradient norms, verdict, clipping, optimizer."""
    save_s: float
    """Copying the state for the checkpoint of the step before; 0 where there was none."""
    step_s: float
    """From the end of the step before to the end of this one."""


@dataclass(frozen=True)
class StepRow:
    """One line; losses in nats, times in seconds, shares and accuracies of 1."""

    step: int
    """Steps attempted so far, this one included."""
    samples: int
    """Pairs shown so far, those of steps that were not taken included."""
    loss: float | None
    """Mean of both directions over the global batch; none when it is no number."""
    image_to_text_accuracy: float | None
    """Share of images whose own caption, of the global batch's, has the highest score."""
    text_to_image_accuracy: float | None
    """Share of captions whose own image has the highest score."""
    logit_scale: float
    """Inverse temperature in the forward pass; at most 100."""
    lr_vision: float
    """Learning rate of the vision tower's last layer."""
    lr_text: float
    """Of the text tower's last layer."""
    lr_other: float
    """Of the logit scale."""
    taken: int
    """1 when the weights were updated, else 0."""
    skipped_steps: int
    """Steps so far that did not update the weights."""
    grad_norm: float | None
    """Norm of the whole gradient before clipping; none when it is no number."""
    grad_norm_vision: float | None
    grad_norm_text: float | None
    grad_norm_other: float | None
    clipped: int
    """1 when the gradient was longer than `grad_clip_norm`, else 0."""
    spike: int
    """1 when loss or gradient norm left their recent range, else 0."""
    rollbacks: int
    """Times so far that training went back to a checkpoint."""
    loss_scale: float | None
    """fp16's factor on the loss in this step."""
    trust_min_vision: float | None
    """Smallest of LAMB's trust ratios in the tower."""
    trust_median_vision: float | None
    trust_max_vision: float | None
    trust_min_text: float | None
    trust_median_text: float | None
    trust_max_text: float | None
    patch_dropout: float
    """Share of patches masked out."""
    text_tokens: float
    """Mean length of the captions, in tokens, start and end among them."""
    images_per_second: float
    """Pairs a second, of all ranks."""
    samples_per_second_per_rank: float
    """Pairs a second of one rank, which is one GPU."""
    mfu: float | None
    """Model FLOP/s as a share of the devices' peak; nothing that is computed twice counts twice.
    None on devices whose peak is not known."""
    data_wait_s: float
    prepare_s: float
    gradient_s: float
    update_s: float
    save_s: float
    step_s: float
    """As `StepTimes` has them."""
    forward_s: float
    """Rank 0's own forward passes."""
    slowest_rank_s: float
    """Data wait and forward passes of the rank that needed longest for them: the rest of a step is
    equally long for all, because they wait for each other."""
    median_rank_s: float
    """The same of the median rank."""
    slow_rank: int | None
    """Number of that rank, when it needed over 1.5 times as long as the median."""
    memory_peak_bytes: int | None
    """Most memory that tensors took on rank 0's GPU since training began; none on a CPU."""
    probe_top1: float | None = None
    """Zero-shot accuracy on the job's probe set after this step."""
    probe_top5: float | None = None
    time: float = 0.0
    """When the line was written, seconds since 1970."""

    def as_json(self) -> dict[str, Any]:
        """What the line says: figures that are there, in the order of the fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def step_row(
    *,
    step: int,
    samples: int,
    config: TrainConfig,
    lr_factor: float,
    together: Together,
    logit_scale: float,
    grad_norms: Mapping[str, float],
    judged: Judged,
    guards: GuardState,
    stepped: Stepped | None,
    skipped_steps: int,
    patch_dropout: float,
    times: StepTimes,
    sample_flops: float,
    device_name: str,
    memory_peak_bytes: int | None,
) -> StepRow:
    """The line of a step.

    Args:
        stepped: what the engine did; none when the step was discarded.
        sample_flops: FLOPs of forward and backward for one pair.
        device_name: of the GPU, as torch says it; empty on a CPU.
    """
    ranks = len(together.rows)
    rate = config.global_batch / times.step_s
    peak = peak_flops(device_name) if device_name else None
    slow_rank, slowest_s, median_s = together.slowest
    taken = judged.verdict is Verdict.TAKE and stepped is not None and not stepped.skipped
    return StepRow(
        step=step,
        samples=samples,
        loss=_number(together.mean("loss")),
        image_to_text_accuracy=_number(together.mean("image_to_text_accuracy")),
        text_to_image_accuracy=_number(together.mean("text_to_image_accuracy")),
        logit_scale=logit_scale,
        lr_vision=config.lr_vision * lr_factor,
        lr_text=config.lr_text * lr_factor,
        lr_other=config.lr_other * lr_factor,
        taken=int(taken),
        skipped_steps=skipped_steps,
        grad_norm=_number(grad_norms["total"]),
        grad_norm_vision=_number(grad_norms["vision"]),
        grad_norm_text=_number(grad_norms["text"]),
        grad_norm_other=_number(grad_norms["other"]),
        clipped=int(stepped is not None and stepped.clipped),
        spike=int(judged.kind == "spike"),
        rollbacks=guards.rollbacks,
        loss_scale=stepped.loss_scale if stepped else None,
        **_trust(stepped),
        patch_dropout=patch_dropout,
        text_tokens=together.mean("text_tokens"),
        images_per_second=rate,
        samples_per_second_per_rank=rate / ranks,
        mfu=rate / ranks * sample_flops / peak if peak else None,
        data_wait_s=times.data_wait_s,
        prepare_s=times.prepare_s,
        gradient_s=times.gradient_s,
        update_s=times.update_s,
        save_s=times.save_s,
        step_s=times.step_s,
        forward_s=together.rows[0].forward_s,
        slowest_rank_s=slowest_s,
        median_rank_s=median_s,
        slow_rank=slow_rank if is_straggler(slowest_s, median_s) else None,
        memory_peak_bytes=memory_peak_bytes,
        time=time.time(),
    )


class MetricsFile:
    """`metrics.jsonl` as rank 0 writes it; a line is there when its step is over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        self._file = self._path.open("a")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: StepRow) -> None:
        """Add a line."""
        assert self._file is not None
        self._file.write(json.dumps(row.as_json()) + "\n")
        self._file.flush()

    def cut_back(self, step: int) -> None:
        """Keep only the whole lines up to `step`: what came after it is done again."""
        if self._file is not None:
            self._file.close()
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        beside.write_bytes(b"".join(kept))
        beside.replace(self._path)
        if self._file is not None:
            self._file = self._path.open("a")

    def last(self, name: str, count: int) -> list[float]:
        """The newest values of a figure, oldest first, at most `count` of them."""
        rows = [json.loads(line) for line in self._path.read_text().splitlines()]
        return [row[name] for row in rows if name in row][-count:]


def _number(value: float) -> float | None:
    """JSON knows no other numbers."""
    return value if math.isfinite(value) else None


def _trust(stepped: Stepped | None) -> dict[str, float | None]:
    ratios = stepped.trust if stepped else {}
    found: dict[str, float | None] = {}
    for tower in ("vision", "text"):
        figures = ratios.get(tower, (None, None, None))
        for name, ratio in zip(("min", "median", "max"), figures, strict=True):
            found[f"trust_{name}_{tower}"] = ratio
    return found
