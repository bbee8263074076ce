"""One rank: saves its part of a small state again and again while it exchanges tensors as training
does, at a pace of its own; tells in `rank-R.json` how it ended."""

import json
import random
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from evaclip_model.training.checkpoint.save_and_load import CheckpointWriter, load_newest
from evaclip_model.training.engine.engine import StateFragment, start_distributed
from evaclip_model.weights.checkpoint_format import TrainingProgress

SIZE = 90_000


def main(folder, steps, fails_on):
    start_distributed("cpu")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pace = random.Random(rank)
    size = SIZE // ranks
    value = torch.full((size,), float("nan"))
    state = [StateFragment("w", rank * size, {"param": value})]
    found = load_newest(folder / "checkpoints", state, {})
    first = found.step if found else 0
    if found:
        assert value.eq(first).all(), value
    ended = {"from": first, "error": None}
    with CheckpointWriter(folder / "checkpoints", keep=2) as writer:
        try:
            for step in range(first + 1, steps + 1):
                if rank == fails_on and step == 4:  # the kernel refuses as on a full disk
                    writer.wait_for_save()
                    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
                time.sleep(pace.random() * 0.02)
                flags = torch.tensor([1.0, float(writer.has_failed())])
                dist.all_reduce(flags)
                assert flags[0] == ranks
                if flags[1]:
                    writer.wait_for_save()
                value.fill_(step)
                if step != 5:
                    writer.begin_save(state, TrainingProgress(step, {}, {}, 0.0, {}))
                writer.wait_for_copy()
                value.fill_(-1)
                ended["done"] = step
            writer.wait_for_save()
        except OSError as error:
            ended["error"] = f"{type(error).__name__} {error.errno}"
    (folder / f"rank-{rank}.json").write_text(json.dumps(ended))


main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
