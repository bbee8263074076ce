"""One rank that reads: every batch's captions, positions and a sum of its pixels, a line a step.

Arguments: manifest, config as JSON, first step, steps, workers, folder for `RANK.jsonl`, and the
step at which the last rank kills itself in the middle of writing its line (-1: none).
"""

import json
import os
import signal
import sys
import zlib
from pathlib import Path

from evaclip_model.reading.reader import BatchReader, ReadSettings
from evaclip_model.training.config import TrainConfig


def main(manifest, config, first, steps, workers, folder, kill):
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings = ReadSettings(workers=int(workers))
    config = TrainConfig(**json.loads(config))
    reader = BatchReader(Path(manifest), config, rank=rank, ranks=ranks, settings=settings)
    with (Path(folder) / f"{rank}.jsonl").open("w") as out:
        for batch in reader.iterate_batches(int(first), int(steps)):
            seen = {"step": batch.step, "captions": batch.captions}
            seen["positions"] = batch.positions.tolist()
            seen["pixels"] = [zlib.crc32(image.contiguous().numpy()) for image in batch.images]
            line = json.dumps(seen) + "\n"
            if batch.step == int(kill) and rank == ranks - 1:
                out.write(line[: len(line) // 2])
                out.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            out.write(line)
            out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
