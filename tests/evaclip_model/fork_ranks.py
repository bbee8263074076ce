"""Starts ranks quickly: imports torch and deepspeed once, then forks for each rank asked for.

Lines in: {"run": [path or module, arguments...], "ranks": R, "port": P, "log": folder} starts ranks
and answers their process ids; {"wait": [pids]} answers their exit codes (-N for signal N).
"""

import json
import os
import runpy
import sys
import traceback

sys.path.insert(0, os.getcwd())  # what `python -m` would have
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # DeepSpeed logs to stdout
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
from deepspeed.runtime.zero import stage_1_and_2  # noqa: E402, F401
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: E402, F401

import evaclip_model.training.trainer  # noqa: E402, F401


def become_rank(rank, ask):
    log = os.open(f"{ask['log']}/rank-{rank}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ask["ranks"]}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ask["port"]}
    os.environ.update({name: str(value) for name, value in where.items()})
    target, *arguments = ask["run"]
    sys.argv = [target, *arguments]
    run = runpy.run_path if target.endswith(".py") else runpy.run_module
    try:
        run(target, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for line in sys.stdin:
    ask = json.loads(line)
    if "wait" in ask:
        answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ask["wait"]]
    else:
        answer = []
        for rank in range(ask["ranks"]):
            pid = os.fork()
            if pid == 0:
                code = become_rank(rank, ask)
                sys.stdout.flush()
                os._exit(code)
            answer.append(pid)
    print(json.dumps(answer), file=answers, flush=True)
