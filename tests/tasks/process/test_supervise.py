"""The supervisor and the way to start it, with real processes and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.process import supervise
from tasks.process.child import run_supervised, start_supervised

PYTHON = sys.executable
# A command that starts two more processes, one of them in a session of its own, and writes pids.
FAMILY = """
import os, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
near = subprocess.Popen([sys.executable, "-c", code])
far = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
with open(sys.argv[1] + ".new", "w") as file:
    file.write(f"{os.getpid()} {near.pid} {far.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(float(sys.argv[2]))
"""


def family(pids: Path, seconds: float) -> list[str]:
    return [PYTHON, "-c", FAMILY, str(pids), str(seconds)]


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def is_running(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def none_left(pids: Path) -> bool:
    numbers = [int(number) for number in pids.read_text().split()]
    assert len(numbers) == 3
    return eventually(lambda: not any(map(is_running, numbers)))


@pytest.mark.parametrize(("code", "status"), [("exit(0)", 0), ("exit(75)", 75)])
def test_the_status_is_the_commands(tmp_path: Path, code: str, status: int) -> None:
    log = tmp_path / "log"
    assert run_supervised([PYTHON, "-c", code], log=log, grace_s=1) == status


def test_a_command_ended_by_a_signal_gives_128_plus_its_number(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_supervised([PYTHON, "-c", code], log=tmp_path / "log", grace_s=1) == 128 + 9


def test_output_goes_to_the_log_and_modules_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "logs" / "child.log"
    code = "from tasks.process.supervise import KILL_WAIT_S; print(KILL_WAIT_S); exit(2)"
    assert run_supervised([PYTHON, "-c", code], log=log, grace_s=1) == 2
    assert log.read_text() == f"{supervise.KILL_WAIT_S}\n"


def test_an_exception_in_poll_leaves_no_process(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def interrupt() -> None:
        if pids.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_supervised(
            family(pids, 60), log=tmp_path / "log", grace_s=0.2, poll=interrupt, poll_s=0.05
        )
    assert none_left(pids)


def test_what_a_finished_command_left_behind_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    assert run_supervised(family(pids, 0), log=tmp_path / "log", grace_s=5) == 0
    assert none_left(pids)


def test_kill_9_of_the_starter_leaves_no_process(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    starter = subprocess.Popen(
        [
            PYTHON,
            "-c",
            "import sys; from pathlib import Path; from tasks.process.child import run_supervised\n"
            f"run_supervised({family(pids, 60)!r}, log=Path({str(tmp_path / 'log')!r}), grace_s=1)",
        ],
        cwd=Path(supervise.__file__).parents[1],
    )
    assert eventually(pids.exists)
    starter.kill()
    starter.wait()
    assert none_left(pids)


def test_kill_9_of_the_supervisor_leaves_no_process(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with start_supervised(family(pids, 60), log=tmp_path / "log", grace_s=1) as process:
        assert eventually(pids.exists)
        process.kill()
    assert none_left(pids)


def test_a_command_has_its_grace_to_save_its_work(tmp_path: Path) -> None:
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    code = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        f"    time.sleep(0.3); pathlib.Path({str(saved)!r}).touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)\n"
    )
    with start_supervised([PYTHON, "-c", code], log=tmp_path / "log", grace_s=10) as process:
        assert eventually(ready.exists)
    assert saved.exists()
    assert process.returncode == 75


def test_a_second_signal_ends_the_grace(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with start_supervised(family(pids, 60), log=tmp_path / "log", grace_s=60) as process:
        assert eventually(pids.exists)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None  # one process of the family ignores SIGTERM
        os.kill(process.pid, signal.SIGTERM)
        process.wait(10)
    assert none_left(pids)
