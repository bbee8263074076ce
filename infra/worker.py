"""A Prefect worker that leaves no run behind as "Running": `python infra/worker.py POOL`.

Prefect's own leaves its runs as Running for ever when it is stopped, and they keep their place
under their deployment's concurrency limit; this one is started again when it dies, is stopped with
its runs, and tells the server that those crashed.
"""

import argparse
import contextlib
import os
import platform
import signal
import subprocess
import sys
import time

import psutil
from up import UserError, crash_runs

RESTART_S = 5
STOP_S = 35  # Prefect gives a flow 30 s to end before it kills it
LEFT_S = 5
CLOSE_S = 20  # MLflow may be going down at the same time; the next run closes what is left
RUN_ID = "PREFECT__FLOW_RUN_ID"


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool")
    parser.add_argument("--type", default="process")
    options = parser.parse_args(arguments)
    stopping = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.append(number))
    name = f"{options.pool}-{platform.node()}"
    command = [sys.executable, "-m", "prefect", "worker", "start", "--name", name]
    command += ["--pool", options.pool, "--type", options.type]
    while not stopping:
        # A group of its own: whoever stops our group must not stop the worker before us.
        worker = subprocess.Popen(command, process_group=0, preexec_fn=hear_interrupts)
        while worker.poll() is None and not stopping:
            time.sleep(0.2)
        if stopping:
            stop(worker, name)
        else:
            sys.stderr.write(f"the worker ended with {worker.returncode}; it is started again\n")
            until = time.monotonic() + RESTART_S
            while not stopping and time.monotonic() < until:
                time.sleep(0.2)
    return 0


def hear_interrupts():
    # Prefect's worker turns SIGTERM into SIGINT, which children of scripts inherit as ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stop(worker, name):
    """End the worker with all its flow runs, and say so to the server."""
    runs = set(runs_of(name).values())
    worker.terminate()
    try:
        worker.wait(STOP_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    deadline = time.monotonic() + LEFT_S
    while runs_of(name) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in runs_of(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if not runs:
        return
    api, secret = os.environ["PREFECT_API_URL"], os.environ.get("PREFECT_API_AUTH_STRING")
    try:
        crash_runs(api.rstrip("/"), secret, id={"any_": sorted(runs)})
    except (OSError, UserError) as error:
        sys.stderr.write(f"runs cannot be marked as crashed: {error}\n")
    try:  # what Prefect's hooks would do if there were a worker
        close = [sys.executable, "-m", "flows.reporting.crash_hook"]
        subprocess.run(close, timeout=CLOSE_S, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        sys.stderr.write(f"MLflow runs are closed by the next run: {error}\n")


def runs_of(name):
    """Process -> flow run, of every process that works for a run of this worker."""
    found = {}
    ours = {"PREFECT__WORKER_NAME": name, "PREFECT_API_URL": os.environ["PREFECT_API_URL"]}
    for process in psutil.process_iter(["environ"]):
        settings = process.info["environ"] or {}
        if RUN_ID in settings and ours.items() <= settings.items():
            found[process.pid] = settings[RUN_ID]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
