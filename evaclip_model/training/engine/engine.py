"""From a loss to an optimizer step: DeepSpeed ZeRO over ranks, or plain torch in one. The only
importer of deepspeed.

Not here: the model, the loss, the schedule's shape, files; masters and gradients (fp32_state.py).
"""

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evaclip_model.cpu.gloo_gather import all_gather_into_tensor
from evaclip_model.errors import InputError
from evaclip_model.model.layers import DTYPES
from evaclip_model.training.config import RANK_STORE, TrainConfig
from evaclip_model.training.engine import fp32_state as states
from evaclip_model.training.engine.deepspeed_config import MIN_LOSS_SCALE, deepspeed_config
from evaclip_model.training.loss.objective import make_objective
from evaclip_model.training.optimizer import optimizer as optim

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

    skipped: bool
    """The gradient was not finite: nothing was changed but fp16's loss scale."""
    loss_scale: float | None = None
    """Factor on fp16's loss in this step; none in other precisions."""
    clipped: bool = False
    """The gradient was longer than `grad_clip_norm`, and made that long."""
    trust: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """Tower -> smallest, median and largest trust ratio of its adapted parameters; AdamW: empty."""


class Engine:
    """One optimizer over one model; both engines in what they share."""

    module: nn.Module
    """What to call for the forward pass."""

    def __init__(
        self,
        config: TrainConfig,
        groups: Sequence[optim.Group],
        named: Mapping[str, nn.Parameter],
        optimizer: optim.Lamb,
        state: states.Fp32State,
    ) -> None:
        self._config = config
        self._groups = groups
        self._named = named
        self._optimizer = optimizer
        self._state = state
        self._bounds = make_objective(config).bounds
        self._norms: Mapping[str, float] | None = None
        self._fragments = []
        for piece in state.held:
            tensors = {"param": piece.tensor, **optimizer.get_moments(piece.tensor)}
            taken = {kind: piece.take_piece(tensor) for kind, tensor in tensors.items()}
            if config.ema_decay is not None:
                taken["ema"] = taken["param"].clone()
            self._fragments.append(StateFragment(piece.name, piece.offset, taken))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of one micro-batch's loss []; `last` completes the step's, over all
        ranks. Ranks' gradients are averaged, those of a rank's micro-batches are added up."""

    def _update_weights(self, norm: float) -> None:
        """Clip and take the step; `norm` is that of the whole gradient, times the loss scale."""

    def grad_norms(self) -> Mapping[str, float]:
        """Norm of the whole gradient ("total") and of each tower's, unscaled, before clipping; not
        finite where that is not. After the last backward and before `step` or `discard_gradient`;
        every rank calls it, and gets the same."""
        if self._norms is None:
            scale = self._loss_scale() or 1.0
            found = _compute_norms(self._state.iterate_gradients())
            self._norms = {tower: norm / scale for tower, norm in found.items()}
        return self._norms

    def step(self, lr_factor: float) -> Stepped:
        """Clip, update with `lr_factor` times the groups' peak learning rates, keep the objective's
        parameters within their bounds.

        A gradient that is not finite changes no weight. In fp16 it must come here all the same, not
        to `discard_gradient`: that is how the loss scale learns of it, until it is at its lowest,
        which raises LossScaleExhausted.
        """
        norm, limit = self.grad_norms()["total"], self._config.grad_clip_norm
        scale, finite = self._loss_scale(), math.isfinite(norm)
        if not finite and scale is not None and scale <= MIN_LOSS_SCALE:
            raise LossScaleExhausted(
                f"gradients overflow fp16 at the lowest loss scale, {MIN_LOSS_SCALE}: lower the "
                "learning rates, or train in bf16 or fp32"
            )
        if not finite and scale is None:
            self.discard_gradient()
            return Stepped(skipped=True)
        self._optimizer.lr_factor = lr_factor
        self._update_weights(norm * (scale or 1.0))
        self._norms = None
        if not finite:  # DeepSpeed has seen it too, and lowered the scale
            return Stepped(skipped=True, loss_scale=scale)
        self._keep_within_bounds()
        if self._config.ema_decay is not None and self._fragments:
            means = [fragment.tensors["ema"] for fragment in self._fragments]
            masters = [fragment.tensors["param"] for fragment in self._fragments]
            torch._foreach_lerp_(means, masters, 1 - self._config.ema_decay)
        clipped = limit is not None and norm > limit
        ratios: dict[str, list[float]] = {}
        for group, found in zip(self._groups, self._optimizer.trust_ratios(), strict=True):
            if found:
                ratios.setdefault(group.tower, []).extend(found)
        trust = {tower: (min(all_), median(all_), max(all_)) for tower, all_ in ratios.items()}
        return Stepped(skipped=False, loss_scale=scale, clipped=clipped, trust=trust)

    def discard_gradient(self) -> None:
        """Forget the gradient: this step is not taken. Also between parts, after a failure."""
        self._norms = None
        self._state.forget_gradients()

    def state_fragments(self) -> list[StateFragment]:
        """The state this rank holds; over all ranks, every element of every trainable parameter
        once."""
        return self._fragments

    def step_counters(self) -> dict[str, Any]:
        """The rest of what decides the next step: JSON values, the same on every rank."""
        counters: dict[str, Any] = {"updates": self._optimizer.updates}
        if self._state.scaler is not None:
            scaler = self._state.scaler
            known = [name for name in SCALER_FIELDS if hasattr(scaler, name)]
            counters["scaler"] = {name: getattr(scaler, name) for name in known}
        return counters

    def restore_counters(self, counters: Mapping[str, Any]) -> None:
        """Take up `counters`, after the tensors of `state_fragments` were filled."""
        self._optimizer.updates = counters["updates"]
        for name, value in counters.get("scaler", {}).items():
            setattr(self._state.scaler, name, value)
        for master, owner in self._state.copies:
            for moment in self._optimizer.get_moments(master.tensor).values():
                dist.broadcast(moment, owner)
        self._state.write_back()

    def _loss_scale(self) -> float | None:
        scaler = self._state.scaler
        return None if scaler is None else float(scaler.cur_scale)

    @torch.no_grad()
    def _keep_within_bounds(self) -> None:
        """Bound fp32 masters, this rank's and those it steps for others, and the module's weights:
        bounding these alone would leave masters to drift."""
        held = [(fragment.name, fragment.tensors["param"]) for fragment in self._fragments]
        copies = [(master.name, master.tensor) for master, _ in self._state.copies]
        for name, tensor in (*held, *copies, *self._named.items()):
            if name in self._bounds:
                tensor.clamp_(*self._bounds[name])


class PlainState(states.Fp32State):
    """Plain torch's masters, of one rank: the parameters, or fp32 copies of low ones, which take
    their gradients and begin at `exact`, the parameters before they were made low."""

    def __init__(self, named: Mapping[str, nn.Parameter], exact: Mapping[str, Tensor]) -> None:
        self._named = named
        masters = {name: _make_master(value, exact.get(name)) for name, value in named.items()}
        self.held = [
            states.Master(name, 0, held, 0, held.numel()) for name, held in masters.items()
        ]

    def iterate_gradients(self) -> Iterator[tuple[str, Tensor]]:
        for master in self.held:
            if master.tensor.grad is not None:
                yield master.name, master.tensor.grad

    def forget_gradients(self) -> None:
        for master in self.held:
            master.tensor.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        for master in self.held:
            if self._named[master.name] is not master.tensor:
                self._named[master.name].copy_(master.tensor)


@torch.no_grad()
def _make_master(parameter: nn.Parameter, exact: Tensor | None) -> Tensor:
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


class TorchEngine(Engine):
    """Plain torch: one rank, fp32 or bf16 with fp32 masters. Needs no DeepSpeed."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        """Take up a model, which gets the type that `config.precision` says. Raises InputError for
        fp16."""
        if config.precision == "fp16":
            raise InputError("engine 'torch' has no loss scale: take precision bf16 or fp32 there")
        self.module = model
        groups, named, exact = _prepare_model(model, config)
        state = PlainState(named, exact)
        masters = {piece.name: piece.tensor for piece in state.held}
        optimizer = make_optimizer(masters, groups, config)
        super().__init__(config, groups, named, optimizer, state)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)

    def _update_weights(self, norm: float) -> None:
        limit = self._config.grad_clip_norm
        if limit is not None and norm > limit:
            gradients = [gradient for _, gradient in self._state.iterate_gradients()]
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        self._optimizer.step()
        self._state.forget_gradients()

    def _keep_within_bounds(self) -> None:
        super()._keep_within_bounds()
        self._state.write_back()


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO, one model copy a rank; needs torch's RANK, WORLD_SIZE, MASTER_* variables."""

    def __init__(self, model: nn.Module, config: TrainConfig, *, accumulates: bool = False) -> None:
        """Take up a model, which gets the type that `config.precision` says; `accumulates` when a
        step's gradient will come in parts."""
        import deepspeed

        groups, named, exact = _prepare_model(model, config)
        optimizer = make_optimizer(named, groups, config)
        # One of DeepSpeed's optimizers tries itself out with a step, which must not decay weights.
        optimizer.lr_factor = 0.0
        self._engine, wrapped, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(
                config,
                dist.get_world_size(),
                sum(parameter.numel() for parameter in model.parameters()),
                accumulates=accumulates,
            ),
            dist_init_required=False,
        )
        optimizer.updates = 0
        self.module = self._engine
        state = _fp32_state_of(wrapped, optimizer, named)
        if state.layouts is not None:
            optimizer.bind_layouts(state.layouts)
        for piece in [*state.held, *(copy for copy, _ in state.copies)]:
            if piece.name in exact:
                value = exact[piece.name].view(-1).narrow(0, piece.offset, piece.size)
                piece.take_piece(piece.tensor).copy_(value)
        super().__init__(config, groups, named, optimizer, state)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._state.before_backward(loss, last=last)
        self._engine.backward(loss, scale_wrt_gas=False)
        self._state.after_backward(last=last)

    def _update_weights(self, norm: float) -> None:
        self._state.before_step(norm)
        self._engine.step()


def start_distributed(device: str, timeout_s: float = 1800) -> None:
    """Join the other ranks, over gloo on "cpu", NCCL on "cuda"; alone, without a launcher, as the
    only rank. They meet at MASTER_ADDR, or where all are on one machine in a file: torch's TCPStore
    listens on every network, whatever address it is given.

    DeepSpeed is told that there is no shared-memory operator, which it would compile for the CPU.
    Over gloo it gathers by a function of ours (gloo_gather.py)."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    store: Any = None
    if "RANK" not in os.environ:
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.HashStore()  # type: ignore[attr-defined]
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that torch is retiring: once a call, in every log.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    backend, timeout = "gloo" if device == "cpu" else "nccl", timedelta(seconds=timeout_s)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if store is None and RANK_STORE in os.environ:
        store = dist.FileStore(os.environ[RANK_STORE], ranks)  # type: ignore[attr-defined]
    if store is not None:  # which DeepSpeed then finds
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)
    # ZeRO reduces in groups of DeepSpeed's own; NCCL's end after 10 minutes where nothing is said.
    deepspeed.comm.comm.cdb.new_group = lambda of: dist.new_group(of, timeout=timeout)
    if device == "cpu":
        deepspeed.comm.comm.cdb.all_gather_function = all_gather_into_tensor


def make_optimizer(
    named: Mapping[str, Tensor], groups: Sequence[optim.Group], config: TrainConfig
) -> optim.Lamb:
    """The optimizer over `groups`, in their order, of the tensors `named`, of any shapes."""
    return optim.Lamb(
        [
            optim.LambPart([named[name] for name in group.names], group.lr_peak, group.weight_decay)
            for group in groups
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        trust_clip=config.lamb.trust_clip,
        adapt=config.optimizer == "lamb",
        adapt_no_decay=config.lamb.adapt_no_decay,
        adapt_whole_tensors=config.lamb.trust_scope == "partition",
    )


def _fp32_state_of(
    wrapped: Any, optimizer: optim.Lamb, named: Mapping[str, Tensor]
) -> states.Fp32State:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    names = {parameter: name for name, parameter in named.items()}
    if isinstance(wrapped, DeepSpeedZeroOptimizer):
        return states.Partitioned(wrapped, names)
    if isinstance(wrapped, BF16_Optimizer):
        return states.Buffered(wrapped, names)
    if wrapped is optimizer or isinstance(wrapped, FP16_UnfusedOptimizer):
        return states.Copied(wrapped, named)
    raise RuntimeError(f"LAMB cannot be bound to {type(wrapped).__name__}")


def _prepare_model(
    model: nn.Module, config: TrainConfig
) -> tuple[list[optim.Group], dict[str, nn.Parameter], dict[str, Tensor]]:
    """Freeze what is not trained, and give the model the stage's type; returns the groups, what is
    trained by name, and of that what loses by the type, in fp32: DeepSpeed would make masters of
    what is left of it."""
    groups = optim.parameter_groups(((n, p.shape) for n, p in model.named_parameters()), config)
    if not groups:
        raise InputError(f"freeze = {list(config.freeze)} leaves nothing to train: take one out")
    config.require_parts([name for name, _ in model.named_parameters()])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not config.is_frozen(name))
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    dtype = DTYPES[config.precision]
    exact = {
        name: parameter.detach()
        for name, parameter in named.items()
        if parameter.dtype == torch.float32 != dtype
    }
    model.to(dtype)  # into new storage: the old stays with `exact`
    return groups, named, exact


def _compute_norms(gradients: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Norms of all ranks' gradients together, "total" and by tower, from the pieces that only this
    rank holds."""
    held = list(gradients)
    squares = torch.zeros(len(optim.TOWERS), dtype=torch.float64)
    if held:
        # In fp32: squares of fp16 overflow long before the gradient does.
        norms = torch._foreach_norm([part for _, part in held], 2, torch.float32)
        squares = squares.to(norms[0].device)
        owner = torch.tensor([optim.TOWERS.index(optim.tower_of(name)) for name, _ in held])
        squares.index_add_(0, owner.to(squares.device), torch.stack(norms).double().square())
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(squares)
    found = dict(zip(optim.TOWERS, squares.sqrt().tolist(), strict=True))
    return {"total": float(squares.sum().sqrt()), **found}
