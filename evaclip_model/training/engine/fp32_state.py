"""The fp32 masters and reduced gradients of a training: one view of DeepSpeed's four optimizers.

Stage 1 and 2 (`DeepSpeedZeroOptimizer`), stage 1 in bf16 with gradients summed in fp32
(`BF16_Optimizer`), stage 0 in low precision (`FP16_UnfusedOptimizer`) and in fp32 (none: the
parameters themselves). Its maps and buffers are private attributes behind its public
`safe_get_full_*` functions; hence the version range in pyproject.toml, and the checks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evaclip_model.training.optimizer.optimizer import Fragment, Layout


@dataclass(frozen=True)
class Master:
    """The place of a piece of a parameter's fp32 master."""

    name: str
    offset: int
    """First element inside the flattened parameter."""
    tensor: Tensor
    """What the optimizer steps: a whole parameter, or a flat slice of many."""
    start: int
    """First element inside the flattened tensor."""
    size: int

    def take_piece(self, tensor: Tensor) -> Tensor:
        """The same piece of `tensor`, which is shaped as `self.tensor`; a view, [size]."""
        return tensor.detach().view(-1).narrow(0, self.start, self.size)


class _Sliced:
    """Each rank steps its slice of every group's flat master.

    Attributes:
        layouts: where parameters lie in each group's flat tensor; none when no tensor is flat.
        held: this rank's share; over all ranks, every element of every trainable parameter once.
        copies: what every rank holds whole, with the rank that has it in `held`; empty if sharded.
        scaler: fp16's loss scale (`cur_scale` and other fields), or none.
    """

    scaler: Any = None

    def __init__(
        self,
        zero: Any,
        names: Mapping[Tensor, str],
        groups: Sequence[Sequence[Tensor]],
        whole: Sequence[Tensor],
        flats: Sequence[Tensor],
    ) -> None:
        """Raises: RuntimeError: DeepSpeed's map contradicts the tensors."""
        self._zero = zero
        placed = make_layouts(groups, whole, flats, zero.real_dp_process_group)
        self.layouts: list[Layout] | None = placed
        self.held = [
            Master(names[parameters[piece.parameter]], piece.offset, flat, piece.start, piece.size)
            for layout, parameters, flat in zip(placed, groups, flats, strict=True)
            for piece in layout.fragments
        ]
        self.copies: list[tuple[Master, int]] = []

    def before_step(self, norm: float) -> None:
        """Hand DeepSpeed's step the norm of the whole gradient, times the loss scale, unless it
        finds that itself."""

    def write_back(self) -> None:
        """Make the model's weights those of the masters; every rank calls it."""
        self._zero.update_lp_params()

    def before_backward(self, loss: Tensor, *, last: bool) -> Tensor:
        """Make ready for adding a micro-batch's gradient; returns the loss [] for DeepSpeed."""
        return loss

    def after_backward(self, *, last: bool) -> None:
        """Put away the gradient of a micro-batch once it was added, unless DeepSpeed does."""


class Partitioned(_Sliced):
    """ZeRO stage 1 or 2, whose reduced gradients are lists of pieces."""

    def __init__(self, zero: Any, names: Mapping[Tensor, str]) -> None:
        """Raises: RuntimeError: DeepSpeed's map contradicts the tensors."""
        if zero.round_robin_gradients or any(map(any, zero.round_robin_bit16_padding)):
            raise RuntimeError("DeepSpeed reorders or pads parameters: its map to masters is wrong")
        flats = zero.single_partition_of_fp32_groups
        super().__init__(zero, names, zero.bit16_groups, zero.bit16_groups_flat, flats)
        self._names = names
        self.scaler = zero.loss_scaler if zero.dtype == torch.float16 else None
        # DeepSpeed would take the norm once more, from an fp32 copy of every gradient.
        self._norm = -1.0
        zero.scaled_global_norm = lambda norm_type=2: torch.tensor(self._norm, device=zero.device)

    def iterate_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Names and this rank's pieces [n] of the reduced gradient, times the loss scale."""
        for number, parameters in enumerate(self._zero.params_in_partition):
            # One tensor for each parameter, then padding that DeepSpeed does not always mark.
            slices = self._zero.averaged_gradients[number]
            real = [part for part in slices if not getattr(part, "_zero_padding", False)]
            for parameter, part in zip(parameters, real, strict=False):
                yield self._names[parameter], part

    def before_step(self, norm: float) -> None:
        self._norm = norm if math.isfinite(norm) else -1.0  # which is how DeepSpeed writes it

    def forget_gradients(self) -> None:
        """Throw away what was added up since the last step."""
        zero = self._zero
        zero.zero_grad()
        zero._release_preflattened_grad_buffers()
        for number in range(len(zero.bit16_groups)):
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None


class Buffered(_Sliced):
    """Stage 1 in bf16 with an fp32 sum of gradients, which every rank holds whole."""

    def __init__(self, zero: Any, names: Mapping[Tensor, str]) -> None:
        """Raises: RuntimeError: DeepSpeed's map contradicts the tensors."""
        self._flats = zero.fp32_groups_flat_partition
        super().__init__(zero, names, zero.bf16_groups, zero.bf16_groups_flat, self._flats)

    def iterate_gradients(self) -> Iterator[tuple[str, Tensor]]:
        slices = self._zero.fp32_groups_gradient_flat_partition
        of_flat = {id(flat): part for flat, part in zip(self._flats, slices, strict=True)}
        for master in self.held:
            yield master.name, master.take_piece(of_flat[id(master.tensor)])

    def forget_gradients(self) -> None:
        self._zero.zero_grad()


class Copied:
    """Stage 0: every rank holds all masters; in fp32 these are the parameters themselves."""

    layouts: list[Layout] | None = None

    def __init__(self, optimizer: Any, named: Mapping[str, Tensor]) -> None:
        """Take up masters from DeepSpeed's optimizer around ours in low precision, else from
        ours."""
        found = {
            id(parameter): master
            for parameters, masters in zip(
                getattr(optimizer, "fp16_groups", ()),
                getattr(optimizer, "fp32_groups", ()),
                strict=True,
            )
            for parameter, master in zip(parameters, masters, strict=True)
        }
        self._pairs = [(named[name], found.get(id(named[name]), named[name])) for name in named]
        whole = [
            Master(name, 0, master, 0, master.numel())
            for name, (_, master) in zip(named, self._pairs, strict=True)
        ]
        self._parameters = dict(named)
        self._sums: dict[str, Tensor] = {}
        owners = _assign_owners([master.size for master in whole], dist.get_world_size())
        self.copies = list(zip(whole, owners, strict=True))
        self.held = [master for master, owner in self.copies if owner == dist.get_rank()]
        scaling = getattr(optimizer, "loss_scale_config", None)
        self.scaler = scaling if scaling is not None and scaling.use_grad_scaling else None

    def iterate_gradients(self) -> Iterator[tuple[str, Tensor]]:
        for master in self.held:
            gradient = self._parameters[master.name].grad
            if gradient is not None:
                yield master.name, gradient

    def before_step(self, norm: float) -> None:
        """Do nothing: DeepSpeed finds the norm itself."""

    def forget_gradients(self) -> None:
        self._sums.clear()
        for parameter in self._parameters.values():
            parameter.grad = None

    def write_back(self) -> None:
        for master, owner in self.copies:
            if dist.get_world_size() > 1:
                dist.broadcast(master.tensor.detach(), owner)
        for parameter, master in self._pairs:
            if parameter is not master:
                parameter.detach().copy_(master.detach())

    def before_backward(self, loss: Tensor, *, last: bool) -> Tensor:
        if last:
            for name, total in self._sums.items():
                parameter = self._parameters[name]
                parameter.grad = total.to(parameter.dtype)
            self._sums.clear()
        # DeepSpeed 0.19 divides this stage's gradients by a scale its `backward` never applied.
        return loss if self.scaler is None else loss * self.scaler.cur_scale

    def after_backward(self, *, last: bool) -> None:
        # A sum of many parts in low precision would stop growing: here it waits in fp32.
        if last:
            return
        for name, parameter in self._parameters.items():
            if parameter.dtype == torch.float32 or parameter.grad is None:
                continue
            total = self._sums.setdefault(name, torch.zeros_like(parameter, dtype=torch.float32))
            total.add_(parameter.grad)
            parameter.grad = None


Fp32State = Partitioned | Buffered | Copied
"""The fp32 side of a model that DeepSpeed trains."""


def make_layouts(
    groups: Sequence[Sequence[Any]],
    whole: Sequence[Tensor],
    flats: Sequence[Tensor],
    process_groups: Sequence[Any],
) -> list[Layout]:
    """Places of all parameters in this rank's flat masters, group by group, checked.

    Args:
        groups: the model's parameters as DeepSpeed groups them, with its map.
        whole: each group's parameters as one flat tensor [n], which they are views of.
        flats: each group's flat fp32 master, this rank's slice [n / ranks].

    Raises: RuntimeError: the map contradicts the tensors.
    """
    return [
        _make_layout(parameters, all_of_it, flat, process_group)
        for parameters, all_of_it, flat, process_group in zip(
            groups, whole, flats, process_groups, strict=True
        )
    ]


def _make_layout(parameters: Sequence[Any], whole: Tensor, flat: Tensor, ranks: Any) -> Layout:
    pieces, position = [], 0
    first = dist.get_rank(ranks) * flat.numel()
    for place, parameter in enumerate(parameters):
        lies_at = (parameter.data_ptr() - whole.data_ptr()) // whole.element_size()
        start = max(position, first)
        end = min(position + parameter.numel(), first + flat.numel())
        held = parameter._hp_mapping
        # Values alone would not tell: equal ones hide that two places are mixed up.
        if lies_at != position or (held is None) != (start >= end):
            raise RuntimeError("DeepSpeed's parameters do not follow one another")
        if held is not None:
            here, there = held.lp_fragment_address, held.hp_fragment_address
            piece = Fragment(place, here.start, there.start, there.numel)
            if piece != Fragment(place, start - position, start - first, end - start):
                raise RuntimeError("DeepSpeed's map from parameters to fp32 masters is wrong")
            module_values = parameter.data.reshape(-1).narrow(0, piece.offset, piece.size)
            masters = flat.data.narrow(0, piece.start, piece.size)
            if not torch.equal(masters.to(module_values.dtype), module_values):
                raise RuntimeError("DeepSpeed's fp32 masters differ from the parameters")
            pieces.append(piece)
        position += parameter.numel()
    covered = torch.zeros(len(parameters), dtype=torch.int64, device=flat.device)
    for piece in pieces:
        covered[piece.parameter] = piece.size
    dist.all_reduce(covered, group=ranks)
    if covered.tolist() != [parameter.numel() for parameter in parameters]:
        raise RuntimeError("DeepSpeed's fp32 masters do not cover every parameter once")
    return Layout(tuple(pieces), None if dist.get_world_size(ranks) == 1 else ranks)


def _assign_owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """A rank for each of a row of tensors, so that all have about as much: neighbours stay."""
    total, before, owners = sum(sizes), 0, []
    for size in sizes:
        owners.append(min(ranks - 1, before * ranks // max(1, total)))
        before += size
    return owners


class RunningMean:
    """mean <- decay * mean + (1 - decay) * master, after every step that was taken; `means` has one
    fp32 tensor for each master."""

    def __init__(self, masters: Sequence[Tensor], decay: float) -> None:
        """Start at the masters as they are; they are kept, and read again at each `update_mean`."""
        self._masters = list(masters)
        self._decay = decay
        self.means = [master.detach().clone() for master in self._masters]

    def update_mean(self) -> None:
        """Take in the masters of a step."""
        if self.means:
            torch._foreach_lerp_(self.means, self._masters, 1 - self._decay)
