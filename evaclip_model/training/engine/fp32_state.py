"""The fp32 masters and reduced gradients of a training: one view of DeepSpeed's four optimizers.

Stage 1 and 2 (`DeepSpeedZeroOptimizer`), stage 1 in bf16 with gradients summed in fp32
(`BF16_Optimizer`), stage 0 in low precision (`FP16_UnfusedOptimizer`) and in fp32 (none: the
parameters themselves). Its maps and buffers are private attributes behind its public
`safe_get_full_*` functions; hence the version range in pyproject.toml, and the checks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from evaclip_model.training.optimizer.optimizer import Fragment, Layout


class Master(NamedTuple):
    """The place of a piece of a parameter's fp32 master: `size` elements, from element `offset` of
    the flattened parameter, and `start` of the tensor on."""

    name: str
    offset: int
    tensor: Tensor
    """What the optimizer steps: a whole parameter, or a flat slice of many."""
    start: int
    size: int

    def take_piece(self, tensor: Tensor) -> Tensor:
        """The same piece of `tensor`, which is shaped as `self.tensor`; a view, [size]."""
        return tensor.detach().view(-1).narrow(0, self.start, self.size)


class Fp32State:
    """The fp32 side of a model that is trained.

    Attributes:
        held: this rank's share; over all ranks, every element of every trainable parameter once.
        copies: what every rank holds whole, with the rank that has it in `held`; empty if sharded.
        layouts: where parameters lie in each group's flat tensor; none when no tensor is flat.
        scaler: fp16's loss scale (`cur_scale` and other fields), or none.
    """

    held: list[Master]
    copies: Sequence[tuple[Master, int]] = ()
    layouts: list[Layout] | None = None
    scaler: Any = None

    def iterate_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Names and this rank's pieces [n] of the reduced gradient, times the loss scale."""
        raise NotImplementedError

    def forget_gradients(self) -> None:
        """Throw away what was added up since the last step."""

    def write_back(self) -> None:
        """Make the model's weights those of the masters; every rank calls it."""

    def before_step(self, norm: float) -> None:
        """Hand DeepSpeed's step the norm of the whole gradient, times the loss scale, unless it
        finds that itself."""

    def before_backward(self, loss: Tensor, *, last: bool) -> Tensor:
        """Make ready for adding a micro-batch's gradient; returns the loss [] for DeepSpeed."""
        return loss

    def after_backward(self, *, last: bool) -> None:
        """Put away the gradient of a micro-batch once it was added, unless DeepSpeed does."""


class _Sliced(Fp32State):
    """Each rank steps its slice of every group's flat master."""

    def __init__(
        self,
        zero: Any,
        names: Mapping[Tensor, str],
        groups: Sequence[Sequence[Tensor]],
        whole: Sequence[Tensor],
        flats: Sequence[Tensor],
    ) -> None:
        self._zero = zero
        self._names = names
        of_groups = zip(groups, whole, flats, zero.real_dp_process_group, strict=True)
        self.layouts = [make_layout(*group) for group in of_groups]
        self.held = [
            Master(names[parameters[piece.parameter]], piece.offset, flat, piece.start, piece.size)
            for layout, parameters, flat in zip(self.layouts, groups, flats, strict=True)
            for piece in layout.fragments
        ]

    def write_back(self) -> None:
        self._zero.update_lp_params()


class Partitioned(_Sliced):
    """ZeRO stage 1 or 2, whose reduced gradients are lists of pieces."""

    def __init__(self, zero: Any, names: Mapping[Tensor, str]) -> None:
        if zero.round_robin_gradients or any(map(any, zero.round_robin_bit16_padding)):
            raise RuntimeError("DeepSpeed reorders or pads parameters: its map to masters is wrong")
        flats = zero.single_partition_of_fp32_groups
        super().__init__(zero, names, zero.bit16_groups, zero.bit16_groups_flat, flats)
        self.scaler = zero.loss_scaler if zero.dtype == torch.float16 else None
        # DeepSpeed would take the norm once more, from an fp32 copy of every gradient.
        self._norm = -1.0
        zero.scaled_global_norm = lambda norm_type=2: torch.tensor(self._norm, device=zero.device)

    def iterate_gradients(self) -> Iterator[tuple[str, Tensor]]:
        for number, parameters in enumerate(self._zero.params_in_partition):
            # One tensor for each parameter, then padding that DeepSpeed does not always mark.
            slices = self._zero.averaged_gradients[number]
            real = [part for part in slices if not getattr(part, "_zero_padding", False)]
            for parameter, part in zip(parameters, real, strict=False):
                yield self._names[parameter], part

    def before_step(self, norm: float) -> None:
        self._norm = norm if math.isfinite(norm) else -1.0  # which is how DeepSpeed writes it

    def forget_gradients(self) -> None:
        zero = self._zero
        zero.zero_grad()
        zero._release_preflattened_grad_buffers()
        for number in range(len(zero.bit16_groups)):
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None


class Buffered(_Sliced):
    """Stage 1 in bf16 with an fp32 sum of gradients, which every rank holds whole."""

    def __init__(self, zero: Any, names: Mapping[Tensor, str]) -> None:
        self._flats = zero.fp32_groups_flat_partition
        super().__init__(zero, names, zero.bf16_groups, zero.bf16_groups_flat, self._flats)

    def iterate_gradients(self) -> Iterator[tuple[str, Tensor]]:
        slices = self._zero.fp32_groups_gradient_flat_partition
        of_flat = {id(flat): part for flat, part in zip(self._flats, slices, strict=True)}
        for master in self.held:
            yield master.name, master.take_piece(of_flat[id(master.tensor)])

    def forget_gradients(self) -> None:
        self._zero.zero_grad()


class Copied(Fp32State):
    """Stage 0: every rank holds all masters; in fp32 these are the parameters themselves."""

    def __init__(self, optimizer: Any, named: Mapping[str, Tensor]) -> None:
        """Take up masters from DeepSpeed's optimizer around ours in low precision, else from
        ours."""
        low = chain.from_iterable(getattr(optimizer, "fp16_groups", ()))
        high = chain.from_iterable(getattr(optimizer, "fp32_groups", ()))
        of_low = {id(parameter): master for parameter, master in zip(low, high, strict=True)}
        masters = {name: of_low.get(id(value), value) for name, value in named.items()}
        whole = [Master(name, 0, master, 0, master.numel()) for name, master in masters.items()]
        self._named = named
        self._sums: dict[str, Tensor] = {}
        # About as much for each rank: neighbours stay together.
        *before, total = accumulate((master.size for master in whole), initial=0)
        ranks = dist.get_world_size()
        owners = [min(ranks - 1, size * ranks // max(1, total)) for size in before]
        self.copies = list(zip(whole, owners, strict=True))
        self.held = [master for master, owner in self.copies if owner == dist.get_rank()]
        scaling = getattr(optimizer, "loss_scale_config", None)
        self.scaler = scaling if scaling is not None and scaling.use_grad_scaling else None

    def iterate_gradients(self) -> Iterator[tuple[str, Tensor]]:
        for master in self.held:
            gradient = self._named[master.name].grad
            if gradient is not None:
                yield master.name, gradient

    def forget_gradients(self) -> None:
        self._sums.clear()
        for parameter in self._named.values():
            parameter.grad = None

    def write_back(self) -> None:
        for master, owner in self.copies:
            dist.broadcast(master.tensor.detach(), owner)
            if self._named[master.name] is not master.tensor:
                self._named[master.name].detach().copy_(master.tensor.detach())

    def before_backward(self, loss: Tensor, *, last: bool) -> Tensor:
        if last:
            for name, total in self._sums.items():
                parameter = self._named[name]
                parameter.grad = total.to(parameter.dtype)
            self._sums.clear()
        # DeepSpeed 0.19 divides this stage's gradients by a scale its `backward` never applied.
        return loss if self.scaler is None else loss * self.scaler.cur_scale

    def after_backward(self, *, last: bool) -> None:
        # A sum of many parts in low precision would stop growing: here it waits in fp32.
        if last:
            return
        for name, parameter in self._named.items():
            if parameter.dtype == torch.float32 or parameter.grad is None:
                continue
            total = self._sums.setdefault(name, torch.zeros_like(parameter, dtype=torch.float32))
            total.add_(parameter.grad)
            parameter.grad = None


def make_layout(parameters: Sequence[Any], whole: Tensor, flat: Tensor, ranks: Any) -> Layout:
    """Places of a group's parameters, which bring DeepSpeed's map, in this rank's flat fp32 master
    [n / ranks]; `whole` [n] is the flat tensor that they are views of. Raises RuntimeError when the
    map contradicts the tensors."""
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
