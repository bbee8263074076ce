"""Parameter groups, learning rates and LAMB.

Sources: the paper's Tables 8-10, with groups as the authors' code makes them (`visual.`, `text.`,
rest); You et al. 2020, algorithm 2, with decoupled decay inside the direction.
Not here: gradient clipping (training/engine/engine.py).

ZeRO hands an optimizer one flat tensor per group: a rank's slice of all the group's parameters,
cut at rank boundaries. A norm of that tensor mixes layers and depends on the number of ranks. Here
squared norms are taken per parameter fragment and summed over ranks before any ratio is formed.
Every group costs ZeRO several collectives a step, so parts with rates of their own are packed.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, repeat
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from evaclip_model.training.config import Schedule, TrainConfig

Tower = Literal["vision", "text", "other"]
TOWERS: tuple[Tower, ...] = ("vision", "text", "other")

_EMBEDDINGS = (
    *("patch_embed", "pos_embed", "cls_token", "mask_token"),
    *("positional_embedding", "token_embedding"),
)
_POSITIONS = ("pos_embed", "cls_token", "positional_embedding", "logit_scale")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


class Group(NamedTuple):
    """Parameters that are stepped alike."""

    tower: Tower
    layer: int
    lr_peak: float
    """Tower's learning rate times the layer's decay."""
    weight_decay: float
    names: tuple[str, ...]


def parameter_groups(shapes: Iterable[tuple[str, torch.Size]], config: TrainConfig) -> list[Group]:
    """Group parameters, of names and shapes in the model's order, by tower, layer and weight decay:
    vision first, then text, then the rest. Frozen ones are in no group."""
    every = list(shapes)
    peaks = {"vision": config.lr_vision, "text": config.lr_text, "other": config.lr_other}
    decays = {"vision": config.layer_decay_vision, "text": config.layer_decay_text, "other": 1.0}
    depths = dict.fromkeys(TOWERS, 0)
    for name, _ in every:
        if block := _BLOCK.search(name):
            depths[tower_of(name)] = max(depths[tower_of(name)], int(block.group(1)) + 1)
    members: dict[tuple[Tower, int, bool], list[str]] = {}
    for name, shape in every:
        if not config.is_frozen(name):
            tower = tower_of(name)
            depth = depths[tower]
            layer = depth + 1 if decays[tower] == 1 else layer_of(name, depth)
            members.setdefault((tower, layer, is_decayed(name, shape)), []).append(name)
    return [
        Group(
            tower,
            layer,
            peaks[tower] * decays[tower] ** (depths[tower] + 1 - layer),
            config.weight_decay if decayed else 0.0,
            tuple(names),
        )
        for tower_wanted in TOWERS
        for (tower, layer, decayed), names in members.items()
        if tower == tower_wanted
    ]


def tower_of(name: str) -> Tower:
    if name.startswith("visual."):
        return "vision"
    return "text" if name.startswith("text.") else "other"


def layer_of(name: str, depth: int) -> int:
    """0 for embeddings, block + 1 inside the blocks, `depth` + 1 for all that follows them."""
    if any(part in name for part in _EMBEDDINGS):
        return 0
    block = _BLOCK.search(name)
    return int(block.group(1)) + 1 if block else depth + 1


def is_decayed(name: str, shape: torch.Size) -> bool:
    """Matrices and embeddings decay; biases, norms, gains and positions do not."""
    return len(shape) > 1 and not name.endswith(".bias") and name.split(".")[-1] not in _POSITIONS


def lr_factor(
    step: int, warmup_steps: int, total_steps: int, schedule: Schedule = "cosine"
) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 0: a line from
    1/warmup to 1; then half a cosine, or a line, that reaches 0 at `total_steps`; or 1. Steps that
    were not taken count: rate and data stay side by side."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


MOMENTS = ("exp_avg", "exp_avg_sq")
CHUNK = 1 << 17
"""Elements updated at a time on a CPU: a chunk and its temporaries stay in a core's cache."""
BATCH = 1 << 27
"""Elements updated at a time elsewhere: many tensors in one kernel, half a gigabyte beside them."""


class LambPart(NamedTuple):
    params: Sequence[Tensor]
    lr: float
    weight_decay: float


class Fragment(NamedTuple):
    """A piece of parameter number `parameter` (of its group): `size` elements, of the parameter
    from `offset` on, of a flat tensor from `start` on."""

    parameter: int
    offset: int
    start: int
    size: int


class Layout(NamedTuple):
    """Places of one group's parameters in this rank's flat tensor, in its order."""

    fragments: tuple[Fragment, ...]
    ranks: dist.ProcessGroup | None
    """Who holds the other fragments; none when all are here."""


class Lamb(torch.optim.Optimizer):
    """LAMB: Adam's direction plus decay, scaled per parameter by |weight| / |direction|. A step
    consumes the gradients: afterwards they hold the directions."""

    lr_factor = 1.0
    """Share of all parts' rates that the next steps take."""

    def __init__(
        self,
        parts: Iterable[LambPart],
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        *,
        trust_clip: tuple[float, float] | None = None,
        adapt: bool = True,
        adapt_no_decay: bool = False,
        adapt_whole_tensors: bool = False,
    ) -> None:
        """Take up parameters without changing them.

        Args:
            trust_clip: bounds of the ratio, or none. A ratio with a zero norm is 1, then bounded.
            adapt: whether to scale at all; without, this is AdamW.
            adapt_no_decay: scale parts without weight decay too; else their ratio is 1.
            adapt_whole_tensors: one ratio for each tensor handed over, whatever it is made of
                (under ZeRO one a group and rank); makes a group of each part, else one of all.
        """
        parts = list(parts)
        together = [[part] for part in parts] if adapt_whole_tensors else [parts]
        super().__init__(
            [
                {"params": [tensor for part in group for tensor in part.params], "parts": group}
                for group in together
            ],
            defaults={"updates": 0, "ranks": None, "ratios": None},
        )
        self._betas = betas
        self._eps = eps
        self._trust_clip = trust_clip
        self._adapt = adapt
        self._adapt_no_decay = adapt_no_decay
        self._adapt_whole_tensors = adapt_whole_tensors
        for group in self.param_groups:
            owners = [number for number, part in enumerate(group["parts"]) for _ in part.params]
            group["pieces"] = [
                FlatSlice(number, number, owner, 0, tensor.numel())
                for number, (tensor, owner) in enumerate(zip(group["params"], owners, strict=True))
            ]
            group["owners"] = owners

    def bind_layouts(self, layouts: Iterable[Layout]) -> None:
        """State where parameters lie in each group's flat tensor, group by group. Raises
        ValueError when a group is not one flat tensor, or a fragment leaves it."""
        for group, layout in zip(self.param_groups, layouts, strict=True):
            if len(group["params"]) != 1 or group["params"][0].dim() != 1:
                raise ValueError("a bound group must hold one flat tensor")
            ends = [fragment.start + fragment.size for fragment in layout.fragments]
            if max(ends, default=0) > group["params"][0].numel():
                raise ValueError("a fragment lies outside the group's flat tensor")
            group["ranks"] = layout.ranks
            group["pieces"] = [
                FlatSlice(0, cut.parameter, group["owners"][cut.parameter], cut.start, cut.size)
                for cut in layout.fragments
            ]

    @property
    def updates(self) -> int:
        """Steps taken; decides the bias correction of the next."""
        return int(self.param_groups[0]["updates"])

    @updates.setter
    def updates(self, count: int) -> None:
        for group in self.param_groups:
            group["updates"] = count

    def trust_ratios(self) -> list[list[float]]:
        """The last step's ratio of every parameter, by part; nothing for a part without. With
        `adapt_whole_tensors` that of every tensor handed over, which under ZeRO is this rank's."""
        found: list[list[float]] = []
        for group in self.param_groups:
            of_parts: list[list[float]] = [[] for _ in group["parts"]]
            ratios = [] if group["ratios"] is None else group["ratios"].tolist()
            owners = repeat(0) if self._adapt_whole_tensors else group["owners"]
            for owner, ratio in zip(owners, ratios, strict=False):
                if self._adapts_part(group["parts"][owner]):
                    of_parts[owner].append(ratio)
            found += of_parts
        return found

    def get_moments(self, tensor: Tensor) -> dict[str, Tensor]:
        """The `MOMENTS` of a tensor, of its shape; zeros if new."""
        state: dict[str, Tensor] = self.state[tensor]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all groups from their gradients; a closure is not supported."""
        if closure is not None:
            raise ValueError("LAMB takes no closure")
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        # Counted by group: ZeRO calls `step` once for each, with the others hidden.
        group["updates"] += 1
        tensors: list[Tensor] = group["params"]
        weights = [tensor.view(-1) for tensor in tensors]
        if any(tensor.grad is None for tensor in tensors):
            raise ValueError("a parameter has no gradient: freeze it before making the optimizer")
        directions = [tensor.grad.reshape(-1) for tensor in tensors if tensor.grad is not None]
        moments = [
            [self.get_moments(tensor)[kind].view(-1) for tensor in tensors] for kind in MOMENTS
        ]
        spans = _merge_neighbours(group["pieces"])
        beta1, beta2 = self._betas
        for weight_decay, batch in batches_of(spans, group["parts"], weights[0].device):
            gradients, parameters, means, squares = (
                [piece.slice_of(flat[piece.tensor]) for piece in batch]
                for flat in (directions, weights, *moments)
            )
            # m / (sqrt(v) + eps) + decay * weight comes in the gradients' place.
            torch._foreach_lerp_(means, gradients, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, (1 - beta2 ** group["updates"]) ** 0.5)
            torch._foreach_add_(roots, self._eps)
            torch._foreach_copy_(gradients, means)
            torch._foreach_div_(gradients, roots)
            torch._foreach_div_(gradients, 1 - beta1 ** group["updates"])
            if weight_decay != 0:
                torch._foreach_add_(gradients, parameters, alpha=weight_decay)
        self._scale_directions(group, weights, directions)
        for part, of_part in groupby(spans, key=lambda span: span.part):
            held = list(of_part)
            torch._foreach_add_(
                [span.slice_of(weights[span.tensor]) for span in held],
                [span.slice_of(directions[span.tensor]) for span in held],
                alpha=-group["parts"][part].lr * self.lr_factor,
            )

    def _scale_directions(
        self, group: dict[str, Any], weights: list[Tensor], directions: list[Tensor]
    ) -> None:
        """Multiply each parameter's direction by its trust ratio, in place."""
        if not any(self._adapts_part(part) for part in group["parts"]):
            return
        if self._adapt_whole_tensors:
            pieces = [FlatSlice(n, n, 0, 0, weight.numel()) for n, weight in enumerate(weights)]
            count, ranks = len(pieces), None
        else:
            pieces = [
                piece for piece in group["pieces"] if self._adapts_part(group["parts"][piece.part])
            ]
            count, ranks = len(group["owners"]), group["ranks"]
        cut_weights, cut_directions = (
            [piece.slice_of(flat[piece.tensor]) for piece in pieces]
            for flat in (weights, directions)
        )
        device = weights[0].device
        squares = torch.zeros(2, count, dtype=torch.float64, device=device)
        owner = torch.tensor([piece.parameter for piece in pieces], dtype=torch.long, device=device)
        if pieces:
            norms = torch._foreach_norm([*cut_weights, *cut_directions])
            squares.index_add_(1, owner, torch.stack(norms).double().square().view(2, -1))
        if ranks is not None:
            dist.all_reduce(squares, group=ranks)
        weight_norm, direction_norm = squares.sqrt()
        is_known = (weight_norm > 0) & (direction_norm > 0)
        ratio = torch.where(is_known, weight_norm / direction_norm, 1.0)
        if self._trust_clip is not None:
            ratio = ratio.clamp(*self._trust_clip)
        group["ratios"] = ratios = ratio.to(weights[0].dtype)
        if pieces:
            torch._foreach_mul_(cut_directions, list(ratios[owner].unbind()))

    def _adapts_part(self, part: LambPart) -> bool:
        return self._adapt and (part.weight_decay != 0 or self._adapt_no_decay)


class FlatSlice(NamedTuple):
    """A range of the group's tensor number `tensor`, flattened, that belongs to one parameter, or
    to one part."""

    tensor: int
    parameter: int
    part: int
    start: int
    size: int

    def slice_of(self, flat: Tensor) -> Tensor:
        """[n] -> [size], a view."""
        return flat.narrow(0, self.start, self.size)


def _merge_neighbours(pieces: Sequence[FlatSlice]) -> list[FlatSlice]:
    """Neighbouring pieces of the same part as one: fewer, longer operations."""
    spans = []
    for _, run in groupby(pieces, key=lambda piece: (piece.tensor, piece.part)):
        held = list(run)
        first, last = held[0], held[-1]
        spans.append(first._replace(size=last.start + last.size - first.start))
    return spans


def batches_of(
    spans: Sequence[FlatSlice], parts: Sequence[LambPart], device: torch.device
) -> Iterator[tuple[float, list[FlatSlice]]]:
    """(weight decay, pieces) of what is updated at a time: a chunk on a CPU, as much as fits in
    `BATCH` elsewhere, where starting a kernel costs more than a small tensor's update."""
    size = CHUNK if device.type == "cpu" else BATCH
    by_decay: dict[float, list[FlatSlice]] = {}
    for span in spans:
        by_decay.setdefault(parts[span.part].weight_decay, []).extend(
            span._replace(start=span.start + first, size=min(size, span.size - first))
            for first in range(0, span.size, size)
        )
    for weight_decay, pieces in by_decay.items():
        batch: list[FlatSlice] = []
        for piece in pieces:
            if batch and sum(held.size for held in batch) + piece.size > size:
                yield weight_decay, batch
                batch = []
            batch.append(piece)
        yield weight_decay, batch
