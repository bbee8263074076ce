"""From a loss to an optimizer step: DeepSpeed ZeRO over ranks, or plain torch in one. The only
importer of deepspeed.

Not here: the model, the loss, the schedule's shape, files; DeepSpeed's buffers (fp32_state.py).
"""

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import median
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evaclip_model.cpu.gloo_gather import all_gather_into_tensor
from evaclip_model.errors import InputError
from evaclip_model.model.layers import DTYPES
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.engine.deepspeed_config import MIN_LOSS_SCALE, deepspeed_config
from evaclip_model.training.engine.fp32_state import (
    Buffered,
    Copied,
    Fp32State,
    Master,
    Partitioned,
    RunningMean,
)
from evaclip_model.training.loss.objective import make_objective
from evaclip_model.training.optimizer.optimizer import (
    TOWERS,
    Group,
    Lamb,
    LambPart,
    parameter_groups,
    tower_of,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""State of DeepSpeed's fp16 loss scaler, by its names."""


@dataclass(frozen=True)
class StateFragment:
    """A piece of one parameter's training state; the tensors are views, to read or to fill."""

    name: str
    offset: int
    """First element inside the flattened parameter."""
    tensors: Mapping[str, Tensor]
    """`param` (fp32 master), `exp_avg` and `exp_avg_sq`, with `ema_decay` also `ema` (the master's
    running mean), each [size]."""


class LossScaleExhausted(RuntimeError):
    """Gradients overflow fp16 even at the lowest loss scale; all ranks raise it together."""


@dataclass(frozen=True)
class Stepped:
    """The engine's account of a step."""

    grad_norm: float
    """Norm of the whole gradient before clipping; infinite when skipped."""
    skipped: bool
    """The gradient was not finite: nothing was changed but fp16's loss scale."""
    loss_scale: float | None = None
    """Factor on fp16's loss in this step; none in other precisions."""
    clipped: bool = False
    """The gradient was longer than `grad_clip_norm`, and made that long."""
    trust: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """Tower -> smallest, median and largest trust ratio of its adapted parameters; AdamW: empty."""


class Engine(Protocol):
    """One optimizer over one model."""

    module: nn.Module
    """What to call for the forward pass."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of one micro-batch; `last` completes the step's, over all ranks.

        Ranks' gradients are averaged, those of a rank's micro-batches are added up. `loss` is [].
        """

    def grad_norms(self) -> Mapping[str, float]:
        """Norm of the whole gradient ("total") and of each tower's, unscaled, before clipping.

        After the last backward and before `step` or `discard_gradient`; every rank calls it, and
        gets the same. A gradient that is not finite shows as a norm that is not.
        """

    def step(self, lr_factor: float) -> Stepped:
        """Clip, update with `lr_factor` times the groups' peak learning rates, keep the objective's
        parameters within their bounds.

        A gradient that is not finite changes no weight. In fp16 it must come here all the same, not
        to `discard_gradient`: that is how the loss scale learns of it.

        Raises: LossScaleExhausted: it has learnt enough.
        """

    def discard_gradient(self) -> None:
        """Forget the gradient: this step is not taken. Also between parts, after a failure."""

    def state_fragments(self) -> list[StateFragment]:
        """The state this rank holds; over all ranks, every element of every trainable parameter
        once."""

    def step_counters(self) -> dict[str, Any]:
        """The rest of what decides the next step: JSON values, the same on every rank."""

    def restore_counters(self, counters: Mapping[str, Any]) -> None:
        """Take up `counters`, after the tensors of `state_fragments` were filled."""


class TorchEngine:
    """Plain torch: one rank, fp32 or bf16 with fp32 masters. Needs no DeepSpeed."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        """Take up a model, which gets the type that `config.precision` says. Raises InputError for
        fp16."""
        if config.precision == "fp16":
            raise InputError("engine 'torch' has no loss scale: take precision bf16 or fp32 there")
        self.module = model
        self._config = config
        self._bounds = make_objective(config).bounds
        self._groups = _make_groups(model, config)
        self._named = _freeze_parameters(model, config)
        exact = _made_low(model, self._named, config)
        self._masters = {
            name: _make_master(parameter, exact.get(name))
            for name, parameter in self._named.items()
        }
        self._optimizer = make_optimizer(self._masters, self._groups, config)
        self._fragments, self._mean = _make_fragments(
            [Master(name, 0, held, 0, held.numel()) for name, held in self._masters.items()],
            self._optimizer,
            config,
        )
        self._norms: Mapping[str, float] | None = None

    def backward(self, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)

    def grad_norms(self) -> Mapping[str, float]:
        if self._norms is None:
            self._norms = _compute_norms(
                (name, master.grad)
                for name, master in self._masters.items()
                if master.grad is not None
            )
        return self._norms

    def step(self, lr_factor: float) -> Stepped:
        norm, limit = self.grad_norms()["total"], self._config.grad_clip_norm
        if not math.isfinite(norm):
            self.discard_gradient()
            return Stepped(math.inf, skipped=True)
        clipped = limit is not None and norm > limit
        if limit is not None and clipped:
            gradients = [held.grad for held in self._masters.values() if held.grad is not None]
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        _set_lr(self._optimizer, self._groups, lr_factor)
        self._optimizer.step()
        _keep_within(self._bounds, self._fragments)
        self._write_back()
        if self._mean is not None:
            self._mean.update_mean()
        self.discard_gradient()
        trust = _summarise_trust(self._optimizer, self._groups)
        return Stepped(norm, skipped=False, clipped=clipped, trust=trust)

    def discard_gradient(self) -> None:
        self._norms = None
        for master in self._masters.values():
            master.grad = None

    def state_fragments(self) -> list[StateFragment]:
        return self._fragments

    def step_counters(self) -> dict[str, Any]:
        return {"updates": self._optimizer.updates}

    def restore_counters(self, counters: Mapping[str, Any]) -> None:
        self._optimizer.updates = counters["updates"]
        self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, parameter in self._named.items():
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])


class DeepSpeedEngine:
    """DeepSpeed ZeRO, one model copy a rank; needs torch's RANK, WORLD_SIZE, MASTER_* variables."""

    def __init__(self, model: nn.Module, config: TrainConfig, *, accumulates: bool = False) -> None:
        """Take up a model, which gets the type that `config.precision` says; `accumulates` when a
        step's gradient will come in parts."""
        import deepspeed

        self._config = config
        self._bounds = make_objective(config).bounds
        self._groups = _make_groups(model, config)
        self._named = _freeze_parameters(model, config)
        exact = _made_low(model, self._named, config)
        self._optimizer = make_optimizer(self._named, self._groups, config)
        # One of DeepSpeed's optimizers tries itself out with a step, which must not decay weights.
        _set_lr(self._optimizer, self._groups, 0.0)
        self._engine, wrapped, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=deepspeed_config(
                config,
                dist.get_world_size(),
                sum(parameter.numel() for parameter in model.parameters()),
                accumulates=accumulates,
            ),
            dist_init_required=False,
        )
        self._optimizer.updates = 0
        self.module: nn.Module = self._engine
        self._masters = _fp32_state_of(wrapped, self._optimizer, self._named)
        if self._masters.layouts is not None:
            self._optimizer.bind_layouts(self._masters.layouts)
        for piece in [*self._masters.held, *(copy for copy, _ in self._masters.copies)]:
            if piece.name in exact:
                value = exact[piece.name].view(-1).narrow(0, piece.offset, piece.size)
                piece.take_piece(piece.tensor).copy_(value)
        self._fragments, self._mean = _make_fragments(self._masters.held, self._optimizer, config)
        self._norms: Mapping[str, float] | None = None

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._masters.before_backward(loss, last=last)
        self._engine.backward(loss, scale_wrt_gas=False)
        self._masters.after_backward(last=last)

    def grad_norms(self) -> Mapping[str, float]:
        if self._norms is None:
            scale = self._loss_scale() or 1.0
            found = _compute_norms(self._masters.iterate_gradients())
            self._norms = {tower: norm / scale for tower, norm in found.items()}
        return self._norms

    def step(self, lr_factor: float) -> Stepped:
        norm, limit = self.grad_norms()["total"], self._config.grad_clip_norm
        scale, finite = self._loss_scale(), math.isfinite(norm)
        if not finite and scale is not None and scale <= MIN_LOSS_SCALE:
            raise LossScaleExhausted(
                f"gradients overflow fp16 at the lowest loss scale, {MIN_LOSS_SCALE}: lower the "
                "learning rates, or train in bf16 or fp32"
            )
        if not finite and scale is None:
            self.discard_gradient()
            return Stepped(math.inf, skipped=True)
        _set_lr(self._optimizer, self._groups, lr_factor)
        self._masters.before_step(norm * (scale or 1.0))
        self._engine.step()
        self._norms = None
        if not finite:  # DeepSpeed has seen it too, and lowered the scale
            return Stepped(math.inf, skipped=True, loss_scale=scale)
        self._keep_within_bounds()
        if self._mean is not None:
            self._mean.update_mean()
        clipped = limit is not None and norm > limit
        trust = _summarise_trust(self._optimizer, self._groups)
        return Stepped(norm, skipped=False, loss_scale=scale, clipped=clipped, trust=trust)

    def discard_gradient(self) -> None:
        self._norms = None
        self._masters.forget_gradients()

    def state_fragments(self) -> list[StateFragment]:
        return self._fragments

    def step_counters(self) -> dict[str, Any]:
        scaler = self._masters.scaler
        counters: dict[str, Any] = {"updates": self._optimizer.updates}
        if scaler is not None:
            counters["scaler"] = {
                name: getattr(scaler, name) for name in SCALER_FIELDS if hasattr(scaler, name)
            }
        return counters

    def restore_counters(self, counters: Mapping[str, Any]) -> None:
        self._optimizer.updates = counters["updates"]
        for name, value in counters.get("scaler", {}).items():
            setattr(self._masters.scaler, name, value)
        if dist.get_world_size() > 1:
            for master, owner in self._masters.copies:
                for moment in self._optimizer.get_moments(master.tensor).values():
                    dist.broadcast(moment, owner)
        self._masters.write_back()

    def _loss_scale(self) -> float | None:
        scaler = self._masters.scaler
        return None if scaler is None else float(scaler.cur_scale)

    @torch.no_grad()
    def _keep_within_bounds(self) -> None:
        _keep_within(self._bounds, self._fragments)
        for master, _ in self._masters.copies:  # those of other ranks are stepped here too
            if master.name in self._bounds:
                master.tensor.clamp_(*self._bounds[master.name])
        for name, bounds in self._bounds.items():
            if name in self._named:
                self._named[name].clamp_(*bounds)


def start_distributed(device: str, store: Any = None, timeout_s: float = 1800) -> None:
    """Join the other ranks, who meet at `store` or at MASTER_ADDR: gloo on "cpu", NCCL on "cuda".

    DeepSpeed would compile a shared-memory operator for the CPU; it is told that there is none, so
    that no compiler is needed. Over gloo it gathers by a function of ours (gloo_gather.py).
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that torch is retiring: once a call, in every log.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    backend = "gloo" if device == "cpu" else "nccl"
    timeout = timedelta(seconds=timeout_s)
    if store is not None:  # which DeepSpeed then finds
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)
    if device == "cpu":
        deepspeed.comm.comm.cdb.all_gather_function = all_gather_into_tensor


def make_optimizer(
    named: Mapping[str, Tensor], groups: Sequence[Group], config: TrainConfig
) -> Lamb:
    """The optimizer over `groups`, in their order, of the tensors `named`, of any shapes."""
    whole_tensors = config.lamb.trust_scope == "partition"
    return Lamb(
        [
            LambPart([named[name] for name in group.names], group.lr_peak, group.weight_decay)
            for group in groups
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        packed=not whole_tensors,
        trust_clip=config.lamb.trust_clip,
        adapt=config.optimizer == "lamb",
        adapt_no_decay=config.lamb.adapt_no_decay,
        adapt_whole_tensors=whole_tensors,
    )


def _fp32_state_of(wrapped: Any, optimizer: Lamb, named: Mapping[str, Tensor]) -> Fp32State:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    names = {parameter: name for name, parameter in named.items()}
    if isinstance(wrapped, DeepSpeedZeroOptimizer):
        return Partitioned(wrapped, names)
    if isinstance(wrapped, BF16_Optimizer):
        return Buffered(wrapped, names)
    if wrapped is optimizer or isinstance(wrapped, FP16_UnfusedOptimizer):
        return Copied(wrapped, named)
    raise RuntimeError(f"LAMB cannot be bound to {type(wrapped).__name__}")


def _freeze_parameters(model: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    config.require_parts([name for name, _ in model.named_parameters()])
    found = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not config.is_frozen(name))
        if parameter.requires_grad:
            found[name] = parameter
    return found


def _made_low(
    model: nn.Module, named: Mapping[str, nn.Parameter], config: TrainConfig
) -> dict[str, Tensor]:
    """Give the model the stage's type; of those of `named` that lose by it, the fp32 values.

    DeepSpeed would make masters of what is left of them.
    """
    dtype = DTYPES[config.precision]
    exact = {
        name: parameter.detach()
        for name, parameter in named.items()
        if parameter.dtype == torch.float32 != dtype
    }
    model.to(dtype)  # into new storage: the old stays with `exact`
    return exact


@torch.no_grad()
def _make_master(parameter: nn.Parameter, exact: Tensor | None) -> Tensor:
    """The tensor to step: the parameter, or an fp32 copy of a low one, which takes its gradients
    and begins at `exact`, the parameter before it was made low, if that is known."""
    if parameter.dtype == torch.float32:
        return parameter
    master = parameter.float() if exact is None else exact.clone()

    def hand_over(from_part: Tensor) -> None:
        if from_part.grad is not None:
            gradient = from_part.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            from_part.grad = None

    parameter.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
    return master


def _make_fragments(
    held: Sequence[Master], optimizer: Lamb, config: TrainConfig
) -> tuple[list[StateFragment], RunningMean | None]:
    masters = [piece.take_piece(piece.tensor) for piece in held]
    mean = None if config.ema_decay is None else RunningMean(masters, config.ema_decay)
    found = []
    for number, (piece, master) in enumerate(zip(held, masters, strict=True)):
        moments = optimizer.get_moments(piece.tensor)
        tensors = {"param": master, **{name: piece.take_piece(moments[name]) for name in MOMENTS}}
        if mean is not None:
            tensors["ema"] = mean.means[number]
        found.append(StateFragment(piece.name, piece.offset, tensors))
    return found, mean


def _keep_within(
    bounds: Mapping[str, tuple[float, float]], fragments: Iterable[StateFragment]
) -> None:
    """Bound the fp32 masters: bounding the module's copies alone would leave them to drift."""
    for fragment in fragments:
        if fragment.name in bounds:
            fragment.tensors["param"].clamp_(*bounds[fragment.name])


def _make_groups(model: nn.Module, config: TrainConfig) -> list[Group]:
    groups = parameter_groups(((n, p.shape) for n, p in model.named_parameters()), config)
    if not groups:
        raise InputError(f"freeze = {list(config.freeze)} leaves nothing to train: take one out")
    return groups


def _summarise_trust(
    optimizer: Lamb, groups: Sequence[Group]
) -> dict[str, tuple[float, float, float]]:
    """Tower -> smallest, median and largest ratio of the last step."""
    ratios: dict[str, list[float]] = {}
    for group, found in zip(groups, optimizer.trust_ratios(), strict=True):
        if found:
            ratios.setdefault(group.tower, []).extend(found)
    return {tower: (min(all_), median(all_), max(all_)) for tower, all_ in ratios.items()}


def _compute_norms(gradients: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Norms of all ranks' gradients together, "total" and by tower, from the pieces that only this
    rank holds."""
    held = list(gradients)
    squares = torch.zeros(len(TOWERS), dtype=torch.float64)
    if held:
        # In fp32: squares of fp16 overflow long before the gradient does.
        norms = torch._foreach_norm([part for _, part in held], 2, torch.float32)
        squares = squares.to(norms[0].device)
        owner = torch.tensor([TOWERS.index(tower_of(name)) for name, _ in held])
        squares.index_add_(0, owner.to(squares.device), torch.stack(norms).double().square())
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(squares)
    found = dict(zip(TOWERS, squares.sqrt().tolist(), strict=True))
    return {"total": float(squares.sum().sqrt()), **found}


def _set_lr(optimizer: Lamb, groups: Sequence[Group], factor: float) -> None:
    for part, group in zip(optimizer.parts, groups, strict=True):
        part.lr = group.lr_peak * factor
