"""Contrastive losses of a global batch, in one process or over many: softmax (CLIP, figure 3) and
sigmoid (SigLIP, algorithm 1), with their accuracies, in at least float32.

Logits are made block by block, and the gradient along with the loss, so that memory is a block and
the features, whatever the batch. Softmax goes over the blocks twice: each row's highest logit, and
the sum of the exponentials below it, have to be known before a gradient is. Kept apart they lose
nothing: the logarithm of the whole sum would be rounded at the size of the logits.

Shapes: b samples of a rank, B samples of the global batch, E joint channels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from evaclip_model.model.layers import to_float32
from evaclip_model.training.config import TeacherConfig
from evaclip_model.training.loss.objective import BLOCK_COLUMNS, BLOCK_ROWS, LossTerms


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Loss [] in nats of a whole batch in one process: features [B, E] of unit length, whose rows i
    are one sample, and the inverse temperature [], already exponentiated."""
    return pair_terms(image_features, text_features, logit_scale, is_whole_batch=True).loss


def gathered_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """This rank's part [] of the loss of a batch spread over ranks; see `pair_terms`."""
    return pair_terms(image_features, text_features, logit_scale, group=group).loss


def pair_terms(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    captions: Tensor | None = None,
    ignores_same: bool = False,
    label_smoothing: float = 0.0,
    teachers: Sequence[Tensor] = (),
    teacher: TeacherConfig | None = None,
    group: dist.ProcessGroup | None = None,
    is_whole_batch: bool = False,
    is_uneven: bool = False,
) -> LossTerms:
    """This rank's rows against the columns of every rank.

    Gradients flow through the gathered columns back to the ranks they came from, so that the mean
    over ranks of each parameter's gradient, of the loss and of the accuracies is that of the whole
    batch in one process. Raises ValueError unless features are pairs of one size.

    Args:
        image_features, text_features: [b, E] of unit length; the same b on every rank, unless
            `is_uneven`, which costs an exchange of them.
        logit_scale: [] inverse temperature.
        logit_bias: [] added to all logits of the sigmoid loss; none for softmax.
        captions: [b, 2] int64 of captions and images: pairs of which one is equal belong together.
            None: all differ.
        ignores_same: such pairs, but a sample's own, count neither way.
        label_smoothing: share of softmax's target that is spread over all columns that count.
        teachers: [b, 2, D] unit features by each teacher; `teacher.weight` of the loss is then the
            mean of KL(teacher || student) over all columns, and the rest the above.
        is_whole_batch: these pairs are all, whatever ranks there are.
    """
    image, text = to_float32(image_features), to_float32(text_features)
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(
            f"features of pairs must both be [b, E], not {list(image.shape)} and {list(text.shape)}"
        )
    is_alone = is_whole_batch or not dist.is_initialized() or dist.get_world_size(group) == 1
    first_row, all_image, all_text, counts = 0, image, text, [len(image)]
    if not is_alone:
        counts *= dist.get_world_size(group)
        if is_uneven:
            own = torch.tensor(len(image), device=image.device)
            counts = _gather_tensor(own, group).tolist()
        first_row, most = sum(counts[: dist.get_rank(group)]), max(counts)
        pair = torch.stack([_pad_rows(side, most) for side in (image, text)])
        both: Tensor = _Gather.apply(pair, group)  # type: ignore[no-untyped-call]
        all_image, all_text = (_join_rows(both[:, side], counts) for side in (0, 1))
        captions = None if captions is None else _gather_rows(captions, counts, group)
    mine = slice(first_row, first_row + len(image))
    if captions is None:
        captions = torch.arange(len(all_image), device=image.device)[:, None]
        matches = _Matches(captions, mine, torch.ones_like(captions[mine, 0]), ignores=False)
    else:
        matches = _Matches(captions, mine, _count_repeats(captions)[mine], ignores_same)
    with torch.autocast(image.device.type, enabled=False):  # half-precision logits cost accuracy
        scalars = [to_float32(logit_scale)]
        spread = partial(matches.spread_targets, label_smoothing, image.dtype)
        compute: Callable[..., _Computed] = partial(_softmax_terms, matches, spread, spread)
        if logit_bias is not None:
            scalars.append(to_float32(logit_bias))
            compute = partial(_sigmoid_terms, matches)
        sides = image, text, all_image, all_text
        terms = LossTerms(*_Blockwise.apply(compute, *sides, *scalars))  # type: ignore[no-untyped-call]
        if is_uneven:  # so that a mean over ranks is one over rows
            weight = len(image) * len(counts) / len(all_image)
            terms = LossTerms(*(weight * term for term in terms))
        if not teachers or teacher is None:
            return terms
        if not is_alone:
            teachers = [_gather_rows(one, counts, group) for one in teachers]
        given = teachers, teacher.logit_scale, mine, image.dtype
        (rows, of_rows), (columns, of_columns) = (_teach_targets(side, *given) for side in (0, 1))
        compute = partial(_softmax_terms, matches, rows, columns)
        crossed, _, _ = _Blockwise.apply(compute, *sides, scalars[0])  # type: ignore[no-untyped-call]
        divergence = crossed - (of_rows + of_columns) / 2
        divergence = divergence * weight if is_uneven else divergence
        return terms._replace(loss=terms.loss.lerp(divergence, teacher.weight))


def _gather_tensor(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] on each rank -> [ranks, ...] on all."""
    local = local.contiguous()
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    return torch.stack(gathered)


def _gather_rows(local: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """[b, ...] on each rank, so many rows of each -> [B, ...] on all."""
    return _join_rows(_gather_tensor(_pad_rows(local, max(counts)), group), counts)


def _pad_rows(local: Tensor, most: int) -> Tensor:
    """[b, ...] with rows of zeros up to `most`."""
    missing = most - len(local)
    return torch.cat([local, local.new_zeros(missing, *local.shape[1:])]) if missing else local


def _join_rows(gathered: Tensor, counts: Sequence[int]) -> Tensor:
    """[ranks, most, ...] -> [B, ...], without what was padded."""
    if min(counts) == gathered.shape[1]:
        return gathered.flatten(0, 1)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


class _Gather(torch.autograd.Function):
    """`_gather_tensor`, whose gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _gather_tensor(local, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        if dist.get_backend(ctx.group) == "nccl":
            own = torch.empty_like(gradient[0])
            dist.reduce_scatter_tensor(own, gradient, group=ctx.group)
            return own, None
        dist.all_reduce(gradient, group=ctx.group)  # gloo has no reduce-scatter
        return gradient[dist.get_rank(ctx.group)], None


_Computed = tuple[Tensor, Tensor, Tensor, list[Tensor]]
"""Loss and both accuracies []; the loss's gradients by all tensors that it was computed from."""


class _Blockwise(torch.autograd.Function):
    """A loss whose gradients were computed with it."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., _Computed], *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, image_hits, text_hits, gradients = compute(*tensors)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(image_hits, text_hits)
        return loss, image_hits, text_hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(gradients[0] * saved for saved in ctx.saved_tensors))


_TargetsOf = Callable[[slice, slice], "_Targets"]
_Targets = tuple[Tensor, Tensor | None]
"""[h, w] of a block of softmax's targets, whose rows sum to 1 over all columns; [h, w] bool: left
out (none: nothing is)."""


@dataclass(frozen=True)
class _Matches:
    """The pairs of a rank's rows and all columns that belong together, and those left out."""

    captions: Tensor
    """[B, K] int64 of all columns; those belong together of which any is equal."""
    rows: slice
    """This rank's among them."""
    repeats: Tensor
    """[b] columns that belong to each row, its own too."""
    ignores: bool

    def cut_block(self, high: slice, wide: slice) -> tuple[Tensor, Tensor | None]:
        """[h, w] bool of rows and columns: they belong together; they count neither way (none: all
        count)."""
        rows, columns = self.captions[self.rows][high], self.captions[wide]
        pairs = zip(rows.unbind(1), columns.unbind(1), strict=True)
        same = reduce(torch.logical_or, (one[:, None] == other for one, other in pairs))
        if not self.ignores:
            return same, None
        places = torch.arange(len(self.captions), device=same.device)
        own = places[self.rows][high, None] == places[wide]
        return own, same & ~own

    def spread_targets(
        self, smoothing: float, dtype: torch.dtype, high: slice, wide: slice
    ) -> _Targets:
        """Softmax's targets of a block, and what is left out."""
        right, left_out = self.cut_block(high, wide)
        repeats, columns = self.repeats[high, None].to(dtype), len(self.captions)
        shares, counted = (1.0, columns - repeats + 1) if self.ignores else (repeats, columns)
        targets = right.to(dtype).mul_((1 - smoothing) / shares)
        if smoothing:
            targets.add_(smoothing / counted)
        return (targets if left_out is None else targets.masked_fill_(left_out, 0)), left_out

    def count_hits(self, best: Tensor) -> Tensor:
        """Share [] of the rows to which their `best` column [b] belongs."""
        return (self.captions[best] == self.captions[self.rows]).any(1).float().mean()


def _count_repeats(captions: Tensor) -> Tensor:
    """[B] how many of captions [B, 2] share a number with each, those that share both once."""
    counted = torch.zeros_like(captions[:, 0])
    for numbers, sign in (captions[:, 0], 1), (captions[:, 1], 1), (captions, -1):
        _, kind, counts = torch.unique(numbers, True, True, True, dim=0)
        counted += sign * counts[kind]
    return counted


def _teach_targets(
    side: int, teachers: Sequence[Tensor], scale: float, mine: slice, dtype: torch.dtype
) -> tuple[_TargetsOf, Tensor]:
    """Softmax's targets of the rows `mine` of a `side`, 0 images or 1 captions: the mean of the
    softmaxes by teachers' features [B, 2, D]; and these' mean entropy [] in nats."""
    sides = [(scale * one[mine, side].to(dtype), one[:, 1 - side]) for one in teachers]
    sums = [rows.new_full((len(rows),), -torch.inf) for rows, _ in sides]
    means = [torch.zeros_like(one) for one in sums]

    def cut_block(teacher: int, high: slice, wide: slice) -> Tensor:
        rows, columns = sides[teacher]
        return rows[high] @ columns[wide].to(dtype).T

    for one, (rows, columns) in enumerate(sides):
        for high, wide in _iterate_blocks(len(rows), len(columns)):
            logits = cut_block(one, high, wide)
            here = logits.logsumexp(1)
            total = torch.logaddexp(sums[one][high], here)
            own = logits.softmax(1).mul_(logits).sum(1).mul_((here - total).exp())
            means[one][high] = means[one][high] * (sums[one][high] - total).exp() + own
            sums[one][high] = total

    def spread_targets(high: slice, wide: slice) -> _Targets:
        each = enumerate(sums)
        shares = [cut_block(n, high, wide).sub_(one[high, None]).exp_() for n, one in each]
        return torch.stack(shares).mean(0), None

    return spread_targets, (torch.stack(sums) - torch.stack(means)).mean()


def _softmax_terms(
    matches: _Matches,
    of_images: _TargetsOf,
    of_texts: _TargetsOf,
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    scale: Tensor,
) -> _Computed:
    image_loss, image_best, d_image, d_all_text = _softmax_rows(of_images, image, all_text, scale)
    text_loss, text_best, d_text, d_all_image = _softmax_rows(of_texts, text, all_image, scale)
    hits = matches.count_hits(image_best), matches.count_hits(text_best)
    d_scale = (d_image * image).sum() + (d_text * text).sum()
    gradients = [d.mul_(scale) for d in (d_image, d_text, d_all_image, d_all_text)]
    return (image_loss + text_loss) / 2, *hits, [*gradients, d_scale]


def _softmax_rows(
    targets_of: _TargetsOf, rows: Tensor, columns: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss [] and best column [b] of rows [b, E]; the gradient of half the loss, over `scale`,
    by rows and columns [B, E]."""
    lowest = torch.finfo(rows.dtype).min  # -inf times a target of 0 would be no number
    highest = rows.new_full((len(rows),), lowest)
    sums, aims = torch.zeros_like(highest), torch.zeros_like(highest)
    best = torch.zeros(len(rows), dtype=torch.long, device=rows.device)

    def block_of(high: slice, wide: slice) -> tuple[Tensor, Tensor]:
        targets, left_out = targets_of(high, wide)
        logits = scale * rows[high] @ columns[wide].T
        return (logits if left_out is None else logits.masked_fill_(left_out, lowest)), targets

    for high, wide in _iterate_blocks(len(rows), len(columns)):
        logits, targets = block_of(high, wide)
        aims[high] += targets.mul_(logits).sum(1)
        top = _track_best(logits, high, wide, highest, best)
        block_sums = logits.sub_(top[:, None]).exp_().sum(1)
        sums[high] = sums[high] * (highest[high] - top).exp() + block_sums
        highest[high] = top
    d_rows, d_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    for high, wide in _iterate_blocks(len(rows), len(columns)):
        part, targets = block_of(high, wide)
        part.sub_(highest[high, None]).exp_().div_(sums[high, None]).sub_(targets)
        part.div_(2 * len(rows))
        d_rows[high].addmm_(part, columns[wide])
        d_columns[wide].addmm_(part.T, rows[high])
    loss = (highest + sums.log() - aims).mean()
    return loss, best, d_rows, d_columns


def _sigmoid_terms(
    matches: _Matches,
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    scale: Tensor,
    bias: Tensor,
) -> _Computed:
    """Every pair is judged for itself, once: by the rank that has its image. The sum over all pairs
    is divided by the number of samples, not of pairs."""
    d_image, d_all_text = torch.zeros_like(image), torch.zeros_like(all_text)
    loss, d_bias = scale.new_zeros(()), scale.new_zeros(())
    for high, wide in _iterate_blocks(len(image), len(all_text)):
        right, left_out = matches.cut_block(high, wide)
        signs = right.to(image.dtype).mul_(2).sub_(1)
        logits = (scale * image[high] @ all_text[wide].T).add_(bias).mul_(signs)
        if left_out is not None:  # as if it were certain: no loss, no gradient
            logits.masked_fill_(left_out, torch.inf)
        loss = loss - F.logsigmoid(logits).sum()
        part = logits.neg_().sigmoid_().mul_(signs).div_(-len(image))
        d_bias = d_bias + part.sum()
        d_image[high].addmm_(part, all_text[wide])
        d_all_text[wide].addmm_(part.T, image[high])
    d_scale = (d_image * image).sum()
    gradients = [d_image.mul_(scale), torch.zeros_like(text), torch.zeros_like(all_image)]
    hits = _share_found(matches, image, all_text), _share_found(matches, text, all_image)
    return loss / len(image), *hits, [*gradients, d_all_text.mul_(scale), d_scale, d_bias]


def _share_found(matches: _Matches, rows: Tensor, columns: Tensor) -> Tensor:
    """Share [] of rows [b, E] whose nearest column [B, E], of those that count, is theirs."""
    highest = rows.new_full((len(rows),), torch.finfo(rows.dtype).min)
    best = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for high, wide in _iterate_blocks(len(rows), len(columns)):
        cosines = rows[high] @ columns[wide].T
        if (left_out := matches.cut_block(high, wide)[1]) is not None:
            cosines.masked_fill_(left_out, -torch.inf)
        highest[high] = _track_best(cosines, high, wide, highest, best)
    return matches.count_hits(best)


def _track_best(logits: Tensor, high: slice, wide: slice, highest: Tensor, best: Tensor) -> Tensor:
    """The highest logit so far [h] of the rows `high`; the place of it is noted in `best` [b]."""
    top, place = logits.max(1)
    # Of equal ones the first, as argmax has it.
    best[high] = torch.where(top > highest[high], place + wide.start, best[high])
    return torch.maximum(top, highest[high])


def _iterate_blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, rows, BLOCK_ROWS):
        for left in range(0, columns, BLOCK_COLUMNS):
            yield (
                slice(top, min(top + BLOCK_ROWS, rows)),
                slice(left, min(left + BLOCK_COLUMNS, columns)),
            )
