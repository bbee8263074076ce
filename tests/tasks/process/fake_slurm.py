"""A Slurm of one machine: `sbatch`, `squeue`, `scancel` and `srun` that really start processes.

The controller is a thread of the test, so that jobs are nobody's children among what is tested, as
on a cluster. The commands are this file, run as `fake_slurm.py COMMAND SPOOL ARGUMENTS...`; they
and the controller talk through files in the spool folder.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

KILL_WAIT_S = 10.0
WAITING_OR_RUNNING = ("PENDING", "RUNNING", "COMPLETING")


class FakeSlurm:
    """A controller at work in a thread; `bin` is to be put on the PATH."""

    def __init__(self, folder):
        self.spool, self.bin = folder / "spool", folder / "bin"
        for made in (self.spool, self.bin):
            made.mkdir(parents=True)
        for name in ("sbatch", "squeue", "scancel", "srun"):
            command = f'exec {sys.executable} -SE {__file__} {name} {self.spool} "$@"'
            (self.bin / name).write_text(f"#!/bin/sh\n{command}\n")
            (self.bin / name).chmod(0o755)
        self._jobs, self._ended = {}, threading.Event()
        self._thread = threading.Thread(target=self._control)
        self._thread.start()

    def close(self):
        self._ended.set()
        self._thread.join()

    @property
    def states(self):
        """State of every job that was ever submitted, in order."""
        return [path.read_text() for path in sorted(self.spool.glob("*.state"))]

    def preempt(self):
        """What the scheduler does before it takes the machine away: SIGTERM to every task."""
        for tasks in self.spool.glob("*.tasks"):
            signal_all(tasks, signal.SIGTERM)

    def _control(self):
        while not self._ended.wait(0.05):
            for state in sorted(self.spool.glob("*.state")):
                self._look_at(state.stem, state)
        for number, job in self._jobs.items():
            signal_all(self.spool / f"{number}.tasks", signal.SIGKILL)
            job.kill()
            job.wait()

    def _look_at(self, number, state):
        cancelled = self.spool / f"{number}.cancel"
        tasks = self.spool / f"{number}.tasks"
        if state.read_text() == "PENDING":
            if cancelled.exists():
                write(state, "CANCELLED")
            else:
                self._jobs[number] = self._start(number)
                write(state, "RUNNING")
        elif number in self._jobs and self._jobs[number].poll() is not None:
            if state.read_text() in WAITING_OR_RUNNING:
                tasks.unlink(missing_ok=True)
                ended_well = self._jobs[number].returncode == 0
                write(state, "COMPLETED" if ended_well else "FAILED")
        elif cancelled.exists() and state.read_text() == "RUNNING":
            signal_all(tasks, signal.SIGTERM)
            write(state, "COMPLETING")

    def _start(self, number):
        script = Path((self.spool / f"{number}.script").read_text())
        given = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", script.read_text(), re.M))
        tasks = int(given["nodes"]) * int(given["ntasks-per-node"])
        shell = {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "localhost"}
        shell |= {"SLURM_NTASKS": str(tasks), "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        with open(given["output"], "ab") as output:
            return subprocess.Popen(
                ["bash", str(script)],
                env={**json.loads((self.spool / f"{number}.env").read_text()), **shell},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


def sbatch(spool, *arguments):
    script = Path(arguments[-1])
    number = f"{len(list(spool.glob('*.state'))) + 1:03d}"
    (spool / f"{number}.script").write_text(str(script))
    (spool / f"{number}.env").write_text(json.dumps(dict(os.environ)))
    write(spool / f"{number}.state", "PENDING")
    print(int(number))


def squeue(spool, *arguments):
    for state in named(spool, arguments):
        wanted = ("PENDING",) if "--states=PENDING" in arguments else WAITING_OR_RUNNING
        if state.read_text() in wanted:
            print(state.read_text())
    (spool / "asked").touch()


def scancel(spool, *arguments):
    for state in named(spool, arguments):
        if state.read_text() in WAITING_OR_RUNNING:
            state.with_suffix(".cancel").touch()


def srun(spool, *arguments):
    """Start the tasks; the first bad end ends all, and is ours."""
    command = [word for word in arguments if word != "--kill-on-bad-exit=1"]
    count, number = int(os.environ["SLURM_NTASKS"]), os.environ["SLURM_JOB_ID"]
    step = {"SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NODELIST": "localhost"}
    tasks = [
        subprocess.Popen(
            command,
            env={**os.environ, **step, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            start_new_session=True,
        )
        for task in range(count)
    ]
    write(spool / f"{number}.tasks", "\n".join(str(task.pid) for task in tasks))
    bad, stop_at = 0, float("inf")
    while any(task.poll() is None for task in tasks):
        codes = [task.returncode for task in tasks if task.returncode]
        if codes and not bad:
            bad, stop_at = codes[0], time.monotonic() + KILL_WAIT_S
            signal_all(spool / f"{number}.tasks", signal.SIGTERM)
        if time.monotonic() > stop_at:
            signal_all(spool / f"{number}.tasks", signal.SIGKILL)
        time.sleep(0.05)
    sys.exit(bad or next((task.returncode for task in tasks if task.returncode), 0))


def named(spool, arguments):
    """State files of the jobs that `--name=` asks for."""
    wanted = next(word.partition("=")[2] for word in arguments if word.startswith("--name="))
    for state in sorted(spool.glob("*.state")):
        script = Path(state.with_suffix(".script").read_text())
        if f"#SBATCH --job-name={wanted}\n" in script.read_text():
            yield state


def signal_all(tasks, number):
    for pid in tasks.read_text().split() if tasks.exists() else ():
        try:
            os.kill(int(pid), number)
        except ProcessLookupError:
            continue


def write(path, text):
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    command, spool, *arguments = sys.argv[1:]
    {"sbatch": sbatch, "squeue": squeue, "scancel": scancel, "srun": srun}[command](
        Path(spool), *arguments
    )
