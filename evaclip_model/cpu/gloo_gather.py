"""The gathering of tensors by which ZeRO's ranks get each other's updated weights, which gloo does
slowly, made of broadcasts, which it does fast: 0.06 s for 1.0 of B/16's (BENCHMARKS.md)."""

import torch.distributed as dist
from torch import Tensor


def all_gather_into_tensor(
    output_tensor: Tensor,
    input_tensor: Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> None:
    """Gather as torch's function of this name: each rank's `input_tensor` [n], which may lie in
    `output_tensor` [ranks * n], is broadcast into its place there."""
    assert not async_op, "ZeRO stages 0 to 2 wait for what they gather; stage 3 alone would not"
    parts = output_tensor.view(-1).chunk(dist.get_world_size(group))
    own = parts[dist.get_rank(group)]
    if own.data_ptr() != input_tensor.data_ptr():
        own.copy_(input_tensor.reshape(-1))
    works = [
        dist.broadcast(part, group=group, group_src=rank, async_op=True)
        for rank, part in enumerate(parts)
    ]
    for work in works:
        work.wait()
