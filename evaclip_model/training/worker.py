"""The program of every rank, `python -m evaclip_model.training.worker TRAIN_JSON`: joining the
other ranks, stopping on SIGTERM, exit codes. Ranks are started by tasks/train, Slurm's srun, or any
launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""

import errno
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from evaclip_model.errors import InputError
from evaclip_model.training.config import ERROR_FILE, MEMORY_FILE, RESUMABLE_FILE, TrainJob

DONE, RESUMABLE, DATA_ERROR, DIVERGED, OUT_OF_MEMORY = 0, 75, 76, 77, 137
"""Exit codes: finished; stopped with a checkpoint; input its author must mend; loss not finite;
memory ran out, as the kernel says it. Any other code is a crash, after which the newest checkpoint
holds."""

AFTER_WATCHDOG_S = 300.0
"""A collective gives up so much later than the watchdog, which names the rank that hangs."""
FIRST_PORT, PORTS = 12_000, 20_000
"""Below the range from which Linux gives ports to whoever asks for any."""


def main(arguments: list[str]) -> int:
    """Run this rank of the job in the file `arguments[0]`; returns the exit code. A launcher may
    turn it into its own, so the reason is a file in the run's folder too: `error.txt` (one
    sentence), `resumable` or `out-of-memory` (empty)."""
    job = TrainJob.from_mapping(json.loads(Path(arguments[0]).read_text()), where=arguments[0])
    stop: list[int] = []  # the loop looks at it between steps
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    import torch

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    os.environ.update(place_from_slurm(os.environ))
    log = logging.getLogger("evaclip_model")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())

    from evaclip_model.training.engine.engine import LossScaleExhausted, start_distributed
    from evaclip_model.training.monitoring.guards import Diverged
    from evaclip_model.training.trainer import Interrupted, run_training

    try:
        if job.engine == "deepspeed" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            start_distributed(device, timeout_s=job.watchdog_s + AFTER_WATCHDOG_S)
        run_training(job, should_stop=lambda: bool(stop))
    except Interrupted:
        (job.run_dir / RESUMABLE_FILE).touch()
        return RESUMABLE
    except (InputError, Diverged, LossScaleExhausted) as error:
        (job.run_dir / ERROR_FILE).write_text(f"{error}\n")
        return DATA_ERROR if isinstance(error, InputError) else DIVERGED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sentence = f"the disk is full at {job.run_dir}: free some space and run the same command "
        (job.run_dir / ERROR_FILE).write_text(f"{sentence}again; the newest checkpoint is kept\n")
        return DATA_ERROR
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.print_exc()
        (job.run_dir / MEMORY_FILE).touch()
        return OUT_OF_MEMORY
    return DONE


def is_out_of_memory(error: Exception) -> bool:
    """True when an allocation failed, on a GPU or in the machine's memory. torch has a type of its
    own for the first alone, and that not in every place."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def place_from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT of a task of `srun`; else nothing.

    Another launcher's RANK wins. Only steps count: the shell of a batch job has SLURM_PROCID too.
    The port follows from the job's number, so that two jobs that share a node do not meet;
    MASTER_ADDR and MASTER_PORT that are set stay.
    """
    if "RANK" in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return {}
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    port = FIRST_PORT + int(environ["SLURM_JOB_ID"]) % PORTS
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
    }


def first_host(nodes: str) -> str:
    """The first machine of Slurm's node list: `gpu[003-005,9],cpu1` begins with `gpu003`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None, "the pattern matches the empty text"
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
