"""The gathering of tensors by which ZeRO's ranks get each other's updated weights, which gloo does
slowly, made of broadcasts, which it does fast: 0.06 s for 1.0 of B/16's (BENCHMARKS.md)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor


class Pending(NamedTuple):
    """Collectives that run beside the caller."""

    works: Sequence[dist.Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def all_gather_into_tensor(
    output_tensor: Tensor,
    input_tensor: Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Pending | None:
    """Gather as torch's function of this name: each rank's `input_tensor` [n], which may lie in
    `output_tensor` [ranks * n], is broadcast into its place there."""
    parts = output_tensor.view(-1).chunk(dist.get_world_size(group))
    own = parts[dist.get_rank(group)]
    if own.data_ptr() != input_tensor.data_ptr():
        own.copy_(input_tensor.reshape(-1))
    works = [
        dist.broadcast(part, group=group, group_src=rank, async_op=True)
        for rank, part in enumerate(parts)
    ]
    if async_op:
        return Pending(works)
    Pending(works).wait()
    return None
