"""Where the training loop stands, besides weights and optimizer.

Covers: attempted steps, the data they were shown, what the guards have seen; as JSON.
Not here: the file it lies in (checkpoint), the loop (trainer.py).

After a rollback the data runs ahead of the steps: step s is shown other samples than it was before.
The learning rate depends on the step, crops and masks on the samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from evaclip_model.training.monitoring.spike_guard import GuardState


@dataclass(frozen=True)
class LoopState:
    """What the next step depends on."""

    step: int = 0
    """Steps attempted."""
    data_step: int = 0
    """Number of the reader's next batch."""
    skipped_steps: int = 0
    """Attempted steps that did not update the weights."""
    guards: GuardState = field(default_factory=GuardState)

    def after(self, guards: GuardState, *, taken: bool) -> Self:
        """Once a step was taken, or thrown away."""
        skipped = self.skipped_steps + (not taken)
        return replace(
            self,
            step=self.step + 1,
            data_step=self.data_step + 1,
            skipped_steps=skipped,
            guards=guards,
        )

    def gone_back(self, spiked: Self, rollbacks: int) -> Self:
        """This state, of a checkpoint, past the data of a later one whose step spiked.

        Args:
            spiked: the state before that step.
            rollbacks: so far, this one included.
        """
        guards = replace(self.guards, rollbacks=rollbacks)
        return replace(self, data_step=spiked.data_step + 1, guards=guards)

    def as_json(self) -> dict[str, Any]:
        """All but `step`, which the checkpoint has."""
        return {
            "data_step": self.data_step,
            "skipped_steps": self.skipped_steps,
            "guards": self.guards.as_json(),
        }

    @classmethod
    def from_json(cls, step: int, values: Mapping[str, Any]) -> Self:
        """The state at `step` that `as_json` was called on; of an empty mapping, an even start."""
        guards = GuardState.from_json(values.get("guards", {}))
        return cls(step, values.get("data_step", step), values.get("skipped_steps", 0), guards)
