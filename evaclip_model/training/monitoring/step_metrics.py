"""The lines of `metrics.jsonl`: one a step, written by rank 0.

Covers: every name in them with its meaning and unit; writing them, and cutting off what a killed
run wrote beyond its newest checkpoint.
Not here: measuring (training/trainer.py, rank_stats.py); MLflow and the terminal, which read the
lines.

A figure that a step has not (the trust ratios of AdamW, the MFU of an unknown device) is left out
of its line. Names stay: charts and comparisons depend on them.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Self, TextIO

import torch

from evaclip_model.files import write_atomically
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.training.config import METRICS_FILE, TrainConfig, TrainJob
from evaclip_model.training.cost import peak_flops, train_flops_per_sample
from evaclip_model.training.engine.engine import Stepped
from evaclip_model.training.loop_state import LoopState
from evaclip_model.training.masking import patch_dropout_at
from evaclip_model.training.monitoring.rank_stats import is_straggler
from evaclip_model.training.monitoring.spike_guard import Judged
from evaclip_model.training.monitoring.tensorboard_log import TENSORBOARD_FOLDER, TensorBoardLog
from evaclip_model.training.rank import Gradient

TOWERS = ("vision", "text", "other")


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
    """Seconds rank 0 waited for its samples."""
    prepare_s: float
    """Captions to ids, and masks."""
    gradient_s: float
    """Forward and backward passes, the loss and the gradient norms, with waiting for other
    ranks."""
    update_s: float
    """Verdict, clipping, optimizer."""
    save_s: float
    """Copying the state for the checkpoint of the step before; 0 where there was none."""
    step_s: float
    """Sum of these five: from the end of the step before to the end of this one."""
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
    state: LoopState,
    config: TrainConfig,
    model: ModelConfig,
    lr_factor: float,
    gradient: Gradient,
    judged: Judged,
    stepped: Stepped | None,
    updated_s: float,
    saved_s: float,
    device: torch.device,
) -> StepRow:
    """The line of a step.

    Args:
        state: after the step.
        stepped: what the engine did; none when the step was discarded.
        updated_s, saved_s: `update_s` and `save_s`.
        device: of this rank.
    """
    together, grad_norms = gradient.together, gradient.norms
    spent = (gradient.waited_s, gradient.prepared_s, gradient.computed_s, updated_s, saved_s)
    step_s = sum(spent)
    masked = patch_dropout_at(config, state.step - 1)
    text_tokens = together.mean("text_tokens")
    flops = train_flops_per_sample(model, patch_dropout=masked, text_tokens=text_tokens)
    ranks = len(together.rows)
    rate = config.global_batch / step_s
    on_gpu = device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(device)) if on_gpu else None
    slow_rank, slowest_s, median_s = together.slowest
    return StepRow(
        step=state.step,
        samples=state.step * config.global_batch,
        loss=_number(together.mean("loss")),
        image_to_text_accuracy=_number(together.mean("image_to_text_accuracy")),
        text_to_image_accuracy=_number(together.mean("text_to_image_accuracy")),
        logit_scale=float(gradient.terms.logit_scale),
        lr_vision=config.lr_vision * lr_factor,
        lr_text=config.lr_text * lr_factor,
        lr_other=config.lr_other * lr_factor,
        taken=int(stepped is not None and not stepped.skipped),
        skipped_steps=state.skipped_steps,
        grad_norm=_number(grad_norms["total"]),
        grad_norm_vision=_number(grad_norms["vision"]),
        grad_norm_text=_number(grad_norms["text"]),
        grad_norm_other=_number(grad_norms["other"]),
        clipped=int(stepped is not None and stepped.clipped),
        spike=int(judged.kind == "spike"),
        rollbacks=state.guards.rollbacks,
        loss_scale=stepped.loss_scale if stepped else None,
        **_trust(stepped),
        patch_dropout=masked,
        text_tokens=text_tokens,
        images_per_second=rate,
        samples_per_second_per_rank=rate / ranks,
        mfu=rate / ranks * flops / peak if peak else None,
        data_wait_s=gradient.waited_s,
        prepare_s=gradient.prepared_s,
        gradient_s=gradient.computed_s,
        update_s=updated_s,
        save_s=saved_s,
        step_s=step_s,
        forward_s=together.rows[0].forward_s,
        slowest_rank_s=slowest_s,
        median_rank_s=median_s,
        slow_rank=slow_rank if is_straggler(slowest_s, median_s) else None,
        memory_peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        time=time.time(),
    )


class MetricsLog:
    """`metrics.jsonl`, and TensorBoard's events where the job asks for them; a context.

    A line is there when its step is over. Every rank has one, and only rank 0's writes.
    """

    def __init__(self, job: TrainJob, *, writes: bool) -> None:
        """Raises: InputError: events are asked for, and what writes them is not installed."""
        self._path = job.run_dir / METRICS_FILE
        self._writes = writes
        self._file: TextIO | None = None
        self._board = TensorBoardLog(job.run_dir / TENSORBOARD_FOLDER) if job.tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, row: StepRow) -> None:
        """Add a line."""
        if not self._writes:
            return
        line = row.as_json()
        if self._file is None:
            self._file = self._path.open("a")
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.write(line)

    def cut_back(self, step: int) -> None:
        """Keep only the whole lines up to `step`: what came after it is done again."""
        if not self._writes:
            return
        if self._file is not None:
            self._file.close()
            self._file = None
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
        write_atomically(self._path, b"".join(kept))
        if self._board is not None:
            self._board.cut_back()

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
