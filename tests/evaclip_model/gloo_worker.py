"""One rank of the gathering over gloo: it fails by itself when a part is not where it belongs."""

from datetime import timedelta

import torch
import torch.distributed as dist

from evaclip_model.cpu.gloo_gather import all_gather_into_tensor
from evaclip_model.training.engine.engine import start_distributed

SIZE = 5
TIMEOUT_S = 4321


def part(rank):
    return torch.arange(SIZE, dtype=torch.bfloat16) + 10 * rank


def main():
    start_distributed("cpu", TIMEOUT_S)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    everything = torch.cat([part(number) for number in range(ranks)])

    whole = torch.zeros(ranks * SIZE, dtype=torch.bfloat16)
    all_gather_into_tensor(whole, part(rank))
    assert whole.equal(everything)

    whole = torch.zeros(ranks * SIZE, dtype=torch.bfloat16)
    own = whole[rank * SIZE : (rank + 1) * SIZE]
    own.copy_(part(rank))
    all_gather_into_tensor(output_tensor=whole, input_tensor=own, async_op=False)
    assert whole.equal(everything)

    last_two = dist.new_group([ranks - 2, ranks - 1])
    if rank >= ranks - 2:
        some = torch.zeros(2, SIZE, dtype=torch.bfloat16)
        all_gather_into_tensor(some, part(rank), group=last_two)
        assert some.flatten().equal(everything[-2 * SIZE :])

    from deepspeed.comm.comm import cdb
    from deepspeed.utils.groups import _get_data_parallel_group

    assert cdb.all_gather_function is all_gather_into_tensor
    # ZeRO reduces gradients in a group of DeepSpeed's own, which torch gives a default of 10 min.
    for group in (dist.group.WORLD, _get_data_parallel_group()):
        options = group._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(seconds=TIMEOUT_S), options._timeout
    dist.destroy_process_group()


main()
