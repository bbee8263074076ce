"""One rank: its device, model, engine and reader, and what it makes of a batch.

Covers: everything up to a step's gradient, and what all ranks know of it.
Not here: whether the step is taken, and what comes after (trainer.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from evaclip_model.cpu.allocator import keep_freed_memory
from evaclip_model.reading.reader import Batch
from evaclip_model.training.assemble import (
    device_of_rank,
    make_engine,
    open_reader,
    set_determinism,
    size_of_parts,
    starting_model,
)
from evaclip_model.training.captions import CaptionTokens, caption_lengths
from evaclip_model.training.config import TrainJob
from evaclip_model.training.monitoring.forward_clock import ForwardClock
from evaclip_model.training.monitoring.rank_stats import Together, exchange
from evaclip_model.training.monitoring.self_test import self_test
from evaclip_model.training.step import StepTerms, forward_backward, loss_settings, step_inputs


class Laps:
    """A stopwatch."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since it was asked last."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


@dataclass(frozen=True)
class Gradient:
    """A step's gradient, which lies with the engine and waits for a verdict."""

    terms: StepTerms
    """This rank's."""
    together: Together
    """All ranks', the same on every rank."""
    norms: Mapping[str, float]
    """As `Engine.grad_norms`."""
    waited_s: float
    """Seconds for the samples."""
    prepared_s: float
    """Seconds for captions and masks."""
    computed_s: float
    """Seconds for everything else."""


class Rank:
    """This process among the run's.

    Attributes:
        number, ranks: which one, of how many.
        device, model, engine, reader: its own.
        part_size: pairs that are in memory at once; none for its whole share.
        tested: what the self-test found.
    """

    def __init__(self, job: TrainJob, should_stop: Callable[[], bool]) -> None:
        """Make ready for the first step.

        Raises:
            InputError: the model, the shards or the settings cannot be used.
            SelfTestFailed: what training rests on does not hold on this machine.
        """
        self._config = config = job.train
        self._should_stop = should_stop
        joined = dist.is_initialized()
        self.number, self.ranks = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        set_determinism(config)
        self.device = device_of_rank()
        if self.device.type == "cpu":
            keep_freed_memory()
        self.part_size = size_of_parts(job, self.ranks)
        self.reader = open_reader(job, self.number, self.ranks)
        self.model = starting_model(job, self.device)
        self._forward = ForwardClock(self.model, self.device)
        self.engine = make_engine(job, self.model, self.part_size)
        self._captions = CaptionTokens(config, self.model.config.text.context_length)
        self._loss = loss_settings(config)
        self.tested = self_test(self.model, config)

    def gradient(self, batch: Batch, step: int, laps: Laps, *, save_failed: bool) -> Gradient:
        """The gradient of a batch; every rank calls it.

        Args:
            step: optimizer step, counted from 0.
            laps: asked last before the batch was waited for.
            save_failed: whether this rank knows that the last checkpoint could not be written.
        """
        waited_s = laps.lap()
        tokens = self._captions.of(batch.captions, batch.positions.tolist())
        inputs = step_inputs(
            self._config,
            self.model.config.vision,
            step,
            batch.images,
            tokens,
            batch.positions,
        )
        lengths = float(caption_lengths(tokens).double().mean())
        prepared_s = laps.lap()
        terms = forward_backward(self.engine, inputs.parts(self.part_size), loss=self._loss)
        row: dict[str, Tensor | float] = {
            "loss": terms.loss,
            "image_to_text_accuracy": terms.image_to_text_accuracy,
            "text_to_image_accuracy": terms.text_to_image_accuracy,
            "text_tokens": lengths,
            "finite": terms.finite_rows.all(),
            "stop": self._should_stop(),
            "save_failed": save_failed,
            "data_wait_s": waited_s,
            "forward_s": self._forward.read(),
        }
        together = exchange(row, self.device)
        norms = self.engine.grad_norms()
        return Gradient(terms, together, norms, waited_s, prepared_s, laps.lap())
