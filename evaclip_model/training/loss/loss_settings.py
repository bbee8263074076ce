"""Settings of the softmax loss, and the memory of its logits. Does not import torch: plans ask for
memory without it."""

from __future__ import annotations

from dataclasses import dataclass

from evaclip_model.training.config import LossImpl

STREAM_FROM_BYTES = 2**30
"""Memory of the logits above which "auto" streams the loss: below it the full loss is faster and
its logits are small beside the activations of as many samples."""
LOGITS_COPIES = 6
"""Matrices of logits that the full loss has at its peak: in both directions the logits, their
log-softmax and their gradient."""
STREAMED_LOSS_BYTES = 2**28
"""Memory of the streamed loss whatever the batch: a chunk of logits and what is made of it."""


@dataclass(frozen=True)
class LossSettings:
    """Settings of the softmax loss."""

    impl: LossImpl = "auto"
    """"full" keeps the logits, "streamed" makes them twice, chunk by chunk; "auto" streams when the
    full loss would take more than `STREAM_FROM_BYTES`. The results are the same."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all B columns, the right one too; in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")

    def should_stream(self, rows: int, columns: int) -> bool:
        """True when `rows` x `columns` float32 logits of each direction are made chunk by chunk."""
        if self.impl == "auto":
            return _full_loss_bytes(rows, columns) > STREAM_FROM_BYTES
        return self.impl == "streamed"

    def loss_bytes(self, rows: int, columns: int) -> float:
        """Most bytes that the loss of `rows` pairs among `columns` takes beside the features."""
        if self.should_stream(rows, columns):
            return STREAMED_LOSS_BYTES
        return _full_loss_bytes(rows, columns)


def _full_loss_bytes(rows: int, columns: int) -> float:
    return LOGITS_COPIES * 4 * rows * columns
