"""What turns a loss into an optimizer step: DeepSpeed ZeRO over ranks, or plain torch in one.

Covers: building the optimizer, backward, clipping, the step, the bound on the logit scale, and a
view of the fp32 state by parameter name (for checkpoints). The only importer of deepspeed.
Not here: the model, the loss, the schedule's shape, files.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evaclip_model.errors import InputError
from evaclip_model.training.config import TrainConfig
from evaclip_model.training.lamb import Fragment, Lamb, Layout, Part
from evaclip_model.training.optim import Group, parameter_groups, tower_of

LOGIT_SCALE_MAX = math.log(100)
"""Upper bound of the logarithm of the inverse temperature (CLIP, section 2.5)."""
LARGEST_BUCKET = 200_000_000
"""Gradient elements reduced together at most."""
MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StateFragment:
    """A piece of one parameter's training state; the tensors are views, to read or to fill."""

    name: str
    offset: int
    """First element inside the flattened parameter."""
    tensors: Mapping[str, Tensor]
    """`param` (fp32 master), `exp_avg` and `exp_avg_sq`, each [size]."""


@dataclass(frozen=True)
class Stepped:
    """What a step did."""

    grad_norm: float
    """Norm of the whole gradient before clipping; infinite when skipped."""
    skipped: bool
    """The gradient was no number: nothing was changed but fp16's loss scale."""
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

        Ranks' gradients are averaged, those of a rank's micro-batches are added up.
        """

    def grad_norms(self) -> Mapping[str, float]:
        """Norm of the whole gradient ("total") and of each tower's, unscaled, before clipping.

        After the last backward and before `step` or `discard`; every rank calls it, and gets the
        same. What is no number shows as one that is not finite.
        """

    def step(self, lr_factor: float) -> Stepped:
        """Clip, and update with `lr_factor` times the groups' peak learning rates."""

    def discard(self) -> None:
        """Forget the gradient: this step is not taken, and nothing remembers it."""

    def fragments(self) -> list[StateFragment]:
        """The state this rank holds; over all ranks, every element of every parameter once."""

    def counters(self) -> dict[str, Any]:
        """What else decides the next step: JSON values, the same on every rank."""

    def restored(self, counters: Mapping[str, Any]) -> None:
        """Take up `counters`, after the tensors of `fragments` were filled."""


class TorchEngine:
    """Plain torch: one rank, fp32."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        """Raises: InputError: a precision this engine does not have."""
        if config.precision != "fp32":
            raise InputError(f"engine 'torch' trains in fp32 only, not in {config.precision}")
        self.module = model
        self._config = config
        self._groups = _groups(model, config)
        self._optimizer = make_optimizer(model, self._groups, config)
        self._scale = _named_logit_scale(self.fragments())

    def backward(self, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)

    def grad_norms(self) -> Mapping[str, float]:
        return _norms(
            (name, parameter.grad)
            for name, parameter in self.module.named_parameters()
            if parameter.grad is not None
        )

    def step(self, lr_factor: float) -> Stepped:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm, limit = self.grad_norms()["total"], self._config.grad_clip_norm
        clipped = limit is not None and norm > limit
        if clipped and limit is not None:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        _set_lr(self._optimizer, self._groups, lr_factor)
        self._optimizer.step()
        _bound_logit_scale(self._scale)
        self.discard()
        return Stepped(norm, skipped=False, clipped=clipped)

    def discard(self) -> None:
        self._optimizer.zero_grad()

    def fragments(self) -> list[StateFragment]:
        return [
            _state(name, 0, parameter.data.view(-1), self._optimizer.moments(parameter))
            for name, parameter in self.module.named_parameters()
        ]

    def counters(self) -> dict[str, Any]:
        return {"updates": self._optimizer.updates}

    def restored(self, counters: Mapping[str, Any]) -> None:
        self._optimizer.updates = counters["updates"]


class DeepSpeedEngine:
    """DeepSpeed ZeRO, one model copy a rank; needs torch's RANK, WORLD_SIZE, MASTER_* variables."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        import deepspeed
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        self._config = config
        self._groups = _groups(model, config)
        self._optimizer = make_optimizer(model, self._groups, config)
        self._named = dict(model.named_parameters())
        self._engine, zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=deepspeed_config(
                config, dist.get_world_size(), sum(p.numel() for p in self._named.values())
            ),
            dist_init_required=False,
        )
        if not isinstance(zero, DeepSpeedZeroOptimizer):
            raise RuntimeError(f"LAMB cannot be bound to {type(zero).__name__}")
        self._zero = zero
        self.module: nn.Module = self._engine
        placed = layouts(zero)
        self._optimizer.bind(placed)
        self._fragments = self._name(placed)
        self._scale = _named_logit_scale(self._fragments)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def grad_norms(self) -> Mapping[str, float]:
        names = {parameter: name for name, parameter in self._named.items()}
        held: list[tuple[str, Tensor]] = []
        for number, parameters in enumerate(self._zero.params_in_partition):
            slices = self._zero.averaged_gradients[number]
            real = [part for part in slices if not getattr(part, "_zero_padding", False)]
            held += zip((names[parameter] for parameter in parameters), real, strict=False)
        scale = self._zero.loss_scale
        return {tower: norm / scale for tower, norm in _norms(held).items()}

    def step(self, lr_factor: float) -> Stepped:
        _set_lr(self._optimizer, self._groups, lr_factor)
        scale = float(self._zero.loss_scale) if self._zero.dtype == torch.float16 else None
        self._engine.step()
        _bound_logit_scale(self._scale)
        self._named["logit_scale"].data.clamp_(0, LOGIT_SCALE_MAX)
        skipped = bool(self._zero.overflow)
        found = self._engine.get_global_grad_norm()
        norm = float("inf") if skipped or found is None else float(found)
        limit = self._config.grad_clip_norm
        return Stepped(norm, skipped, scale, clipped=limit is not None and norm > limit)

    def discard(self) -> None:
        zero = self._zero
        zero.zero_grad()
        zero._release_preflattened_grad_buffers()
        for number in zero.averaged_gradients:
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None

    def fragments(self) -> list[StateFragment]:
        return self._fragments

    def _name(self, placed: list[Layout]) -> list[StateFragment]:
        names = {parameter: name for name, parameter in self._named.items()}
        found = []
        for parameters, flat, layout in zip(
            self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, placed, strict=True
        ):
            moments = self._optimizer.moments(flat)
            for piece in layout.fragments:
                span = (0, piece.start, piece.size)
                parts = {name: moment.narrow(*span) for name, moment in moments.items()}
                name = names[parameters[piece.parameter]]
                found.append(_state(name, piece.offset, flat.data.narrow(*span), parts))
        return found

    def counters(self) -> dict[str, Any]:
        scaler = self._zero.loss_scaler
        return {
            "updates": self._optimizer.updates,
            "scaler": {
                name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)
            },
        }

    def restored(self, counters: Mapping[str, Any]) -> None:
        self._optimizer.updates = counters["updates"]
        for name, value in counters.get("scaler", {}).items():
            setattr(self._zero.loss_scaler, name, value)
        self._zero.update_lp_params()


def start_distributed(device: str) -> None:
    """Join the other ranks: gloo on "cpu", NCCL on "cuda".

    DeepSpeed would compile a shared-memory operator for the CPU; it is told that there is none, so
    that no compiler is needed.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that torch is retiring: once a call, in every log.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed("gloo" if device == "cpu" else "nccl", auto_mpi_discovery=False)


def deepspeed_config(config: TrainConfig, ranks: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a training stage; the micro-batch is all of a rank's share.

    Args:
        parameters: elements of the whole model.
    """
    settings: dict[str, Any] = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.global_batch // ranks,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero_stage,
            # Reordering would break the map from parameters to their fp32 masters.
            "round_robin_gradients": False,
            # DeepSpeed allocates as much in every step, however small the model is.
            "reduce_bucket_size": min(parameters, LARGEST_BUCKET),
        },
    }
    if config.grad_clip_norm is not None:
        settings["gradient_clipping"] = config.grad_clip_norm
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if config.precision == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return settings


def make_optimizer(model: nn.Module, groups: list[Group], config: TrainConfig) -> Lamb:
    """The optimizer over `groups`, in their order."""
    named = dict(model.named_parameters())
    whole_tensors = config.trust_scope == "partition"
    return Lamb(
        [
            Part([named[name] for name in group.names], group.lr_peak, group.weight_decay)
            for group in groups
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        packed=not whole_tensors,
        trust_clip=config.trust_clip,
        adapt=config.optimizer == "lamb",
        adapt_no_decay=config.adapt_no_decay,
        adapt_whole_tensors=whole_tensors,
    )


def layouts(zero: Any) -> list[Layout]:
    """Where each parameter lies in this rank's flat fp32 tensors, group by group, checked.

    Args:
        zero: DeepSpeed's ZeRO stage 1 or 2 optimizer. Its fragment map is private to DeepSpeed but
            stands behind its public `safe_get_full_fp32_param`.

    Raises:
        RuntimeError: the map contradicts the tensors.
    """
    found = []
    for number, (parameters, flat) in enumerate(
        zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
    ):
        pieces = []
        for place, parameter in enumerate(parameters):
            held = parameter._hp_mapping
            if held is None:
                continue
            here, there = held.lp_fragment_address, held.hp_fragment_address
            pieces.append(Fragment(place, here.start, there.start, there.numel))
            module_values = parameter.data.reshape(-1).narrow(0, here.start, here.numel)
            masters = flat.data.narrow(0, there.start, there.numel)
            if not torch.equal(masters.to(module_values.dtype), module_values):
                raise RuntimeError("DeepSpeed's map from parameters to fp32 masters is wrong")
        process_group = zero.real_dp_process_group[number]
        covered = torch.zeros(len(parameters), dtype=torch.int64, device=flat.device)
        for piece in pieces:
            covered[piece.parameter] = piece.size
        dist.all_reduce(covered, group=process_group)
        if covered.tolist() != [parameter.numel() for parameter in parameters]:
            raise RuntimeError("DeepSpeed's fp32 masters do not cover every parameter once")
        alone = dist.get_world_size(process_group) == 1
        found.append(Layout(tuple(pieces), None if alone else process_group))
    return found


def _bound_logit_scale(fragments: Iterable[StateFragment]) -> None:
    """Keep the fp32 master in [0, ln 100]: bounding the module's copy would leave it to drift."""
    for fragment in fragments:
        fragment.tensors["param"].clamp_(0, LOGIT_SCALE_MAX)


def _named_logit_scale(fragments: Iterable[StateFragment]) -> list[StateFragment]:
    return [fragment for fragment in fragments if fragment.name == "logit_scale"]


def _groups(model: nn.Module, config: TrainConfig) -> list[Group]:
    return parameter_groups(((n, p.shape) for n, p in model.named_parameters()), config)


def _norms(gradients: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Norms of all ranks' gradients together, "total" and by tower.

    Args:
        gradients: name of a parameter, and the piece of its gradient that only this rank holds.
    """
    held = list(gradients)
    towers = ("vision", "text", "other")
    squares = torch.zeros(len(towers), dtype=torch.float64)
    if held:
        # In fp32: squares of fp16 overflow long before the gradient does.
        norms = torch._foreach_norm([part for _, part in held], 2, torch.float32)
        squares = squares.to(norms[0].device)
        owner = torch.tensor([towers.index(tower_of(name)) for name, _ in held])
        squares.index_add_(0, owner.to(squares.device), torch.stack(norms).double().square())
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(squares)
    found = dict(zip(towers, squares.sqrt().tolist(), strict=True))
    return {"total": float(squares.sum().sqrt()), **found}


def _set_lr(optimizer: Lamb, groups: list[Group], factor: float) -> None:
    for part, group in zip(optimizer.parts, groups, strict=True):
        part.lr = group.lr_peak * factor


def _state(name: str, offset: int, master: Tensor, moments: Mapping[str, Tensor]) -> StateFragment:
    held = {moment: moments[moment].view(-1) for moment in MOMENTS}
    return StateFragment(name, offset, {"param": master, **held})
