"""LAMB that stays right when its parameters are flat slices of many tensors (ZeRO).

Covers: the update rule, and `bind`, which tells it where parameters lie in DeepSpeed's partitions.
Not here: gradient clipping, learning-rate schedules, the making of parameter groups.
Source: You et al. 2020, algorithm 2, with decoupled decay inside the direction.

ZeRO hands an optimizer one flat tensor per group: a rank's slice of all the group's parameters,
cut at rank boundaries. A norm of that tensor mixes layers and depends on the number of ranks. Here
squared norms are taken per parameter fragment and summed over ranks before any ratio is formed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 17
"""Elements updated at a time: a chunk and its temporaries stay in a core's cache."""


@dataclass(frozen=True)
class Fragment:
    """A piece of parameter number `parameter` (of its group): `size` elements of a flat tensor."""

    parameter: int
    offset: int
    """First element inside the parameter."""
    start: int
    """First element inside the flat tensor."""
    size: int


@dataclass(frozen=True)
class Layout:
    """How one group's parameters lie in this rank's flat tensor."""

    fragments: tuple[Fragment, ...]
    parameters: int
    """Parameters of the group, on all ranks."""
    ranks: dist.ProcessGroup | None
    """Who holds the other fragments; none when all are here."""


class Lamb(torch.optim.Optimizer):
    """LAMB: Adam's direction plus decay, scaled per parameter by |weight| / |direction|.

    Args:
        params: parameter groups; each with its own `lr` and `weight_decay`.
        trust_clip: bounds of the ratio, or none. A ratio with a zero norm is 1, before clipping.
        adapt: whether to scale at all; without, this is AdamW.
        adapt_no_decay: scale groups without weight decay too; else their ratio is 1.
        trust_scope: "parameter", or "partition": one ratio for each tensor handed over, whatever
            it is made of (under ZeRO, one per group and rank).
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        trust_clip: tuple[float, float] | None = None,
        adapt: bool = True,
        adapt_no_decay: bool = False,
        trust_scope: Literal["parameter", "partition"] = "parameter",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.trust_clip = trust_clip
        self.adapt = adapt
        self.adapt_no_decay = adapt_no_decay
        self.trust_scope = trust_scope
        self._layouts: dict[Tensor, Layout] = {}

    def bind(self, layouts: Iterable[Layout]) -> None:
        """State where parameters lie in each group's flat tensor, group by group.

        Raises:
            ValueError: a group is not one flat tensor, or a fragment leaves it.
        """
        for group, layout in zip(self.param_groups, layouts, strict=True):
            if len(group["params"]) != 1:
                raise ValueError("a bound group must hold one flat tensor")
            flat = group["params"][0]
            ends = [fragment.start + fragment.size for fragment in layout.fragments]
            if flat.dim() != 1 or max(ends, default=0) > flat.numel():
                raise ValueError("a fragment lies outside the group's flat tensor")
            self._layouts[flat] = layout

    @property
    def updates(self) -> int:
        """Steps taken; decides the bias correction of the next."""
        return int(self.param_groups[0].get("updates", 0))

    @updates.setter
    def updates(self, count: int) -> None:
        for group in self.param_groups:
            group["updates"] = count

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all groups from their gradients; a closure is not supported."""
        if closure is not None:
            raise ValueError("LAMB takes no closure")
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if tensors:
                self._step_group(group, tensors)

    def _step_group(self, group: dict[str, Any], tensors: list[Tensor]) -> None:
        # Counted by group: ZeRO calls `step` once for each group, with the others hidden.
        group["updates"] = group.get("updates", 0) + 1
        directions = [self._direction(tensor, group) for tensor in tensors]
        if self.adapt and (group["weight_decay"] != 0 or self.adapt_no_decay):
            for tensor, direction in zip(tensors, directions, strict=True):
                self._adapt(tensor, direction)
        torch._foreach_add_(tensors, directions, alpha=-group["lr"])

    def _direction(self, tensor: Tensor, group: dict[str, Any]) -> Tensor:
        """Advance the moments and return m / (sqrt(v) + eps) + decay * weight, bias-corrected."""
        beta1, beta2 = group["betas"]
        mean_correction = 1 - beta1 ** group["updates"]
        root_correction = (1 - beta2 ** group["updates"]) ** 0.5
        state = self.moments(tensor)
        direction = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        assert tensor.grad is not None
        size = CHUNK if tensor.device.type == "cpu" else max(1, tensor.numel())
        parts = (tensor, tensor.grad, state["exp_avg"], state["exp_avg_sq"], direction)
        chunks = (torch.split(part.reshape(-1), size) for part in parts)
        for weight, grad, mean, square, out in zip(*chunks, strict=True):
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            root = square.sqrt().div_(root_correction).add_(group["eps"])
            torch.div(mean, root, out=out).div_(mean_correction)
            if group["weight_decay"] != 0:
                out.add_(weight, alpha=group["weight_decay"])
        return direction

    def moments(self, tensor: Tensor) -> dict[str, Tensor]:
        """First and second moment of a tensor (`exp_avg`, `exp_avg_sq`), zeros if new."""
        state: dict[str, Tensor] = self.state[tensor]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        return state

    def _adapt(self, tensor: Tensor, direction: Tensor) -> None:
        """Multiply `direction` by each parameter's trust ratio, in place."""
        layout = self._layouts.get(tensor)
        if layout is None or self.trust_scope == "partition":
            whole = Fragment(0, 0, 0, tensor.numel())
            layout = Layout((whole,), parameters=1, ranks=None)
        cut = [(fragment.start, fragment.size) for fragment in layout.fragments]
        owner = torch.tensor([fragment.parameter for fragment in layout.fragments]).to(
            tensor.device, torch.long
        )
        weights = [tensor.reshape(-1).narrow(0, *span) for span in cut]
        pieces = [direction.view(-1).narrow(0, *span) for span in cut]
        squares = torch.zeros(2, layout.parameters, dtype=torch.float64, device=tensor.device)
        if cut:
            norms = torch.stack([*torch._foreach_norm(weights), *torch._foreach_norm(pieces)])
            squares.index_add_(1, owner, norms.double().square().view(2, -1))
        if layout.ranks is not None:
            dist.all_reduce(squares, group=layout.ranks)
        ratio = self._trust_ratio(*squares.sqrt()).to(tensor.dtype)
        if cut:
            torch._foreach_mul_(pieces, list(ratio[owner].unbind()))

    def _trust_ratio(self, weight_norm: Tensor, direction_norm: Tensor) -> Tensor:
        ratio = torch.where(
            (weight_norm > 0) & (direction_norm > 0), weight_norm / direction_norm, 1.0
        )
        return ratio if self.trust_clip is None else ratio.clamp(*self.trust_clip)
