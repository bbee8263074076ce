"""Run one command so that nothing of it survives: `python -m tasks.process.supervise GRACE --
CMD...`

Stops on end of file at stdin (the starter died, even by kill -9), SIGTERM, SIGINT or SIGHUP:
SIGTERM to CMD's group, GRACE seconds for it to end, then SIGKILL to every process that CMD left
behind. A second signal ends the grace. Exits with CMD's status, 128 + N if signal N ended it.
Standard library only: it must start in milliseconds and under any environment.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KILL_WAIT_S = 10.0
TICK_S = 0.05


def supervise_command(command: list[str], grace_s: float) -> int:
    """Run `command` to its end, or to the end of whoever holds our stdin; return its status."""
    signals = _SignalPipe()
    _call_prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        # Safe here, unlike in a flow: with one thread, the signal means the supervisor's death.
        preexec_fn=lambda: _call_prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    stdin = sys.stdin.fileno()
    stopping = False
    while child.poll() is None and not stopping:
        ready, _, _ = select.select([stdin, signals.reader], [], [])
        stopping = signals.take_stop() or (stdin in ready and not os.read(stdin, 1024))
    if stopping:
        _signal_group(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and not signals.take_stop():
            child.poll()
            _reap_orphans(child.pid)
            if not _list_descendants(os.getpid()):
                break
            time.sleep(TICK_S)
    _kill_all(child)
    status = child.wait()
    return status if status >= 0 else 128 - status


class _SignalPipe:
    """Signals as bytes in a pipe, so that one `select` waits for them, for stdin and for CMD."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        for end in (self.reader, writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, signal.SIGCHLD):
            # The pipe carries the news; a handler only keeps the default action away.
            signal.signal(number, lambda *_: None)

    def take_stop(self) -> bool:
        with suppress(BlockingIOError):
            numbers = os.read(self.reader, 1024)
            return any(number in numbers for number in STOP_SIGNALS)
        return False


def _call_prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _kill_all(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the group and every descendant, until none is left."""
    deadline = time.monotonic() + KILL_WAIT_S
    _signal_group(child.pid, signal.SIGKILL)
    while time.monotonic() < deadline:
        child.poll()
        _reap_orphans(child.pid)
        left = _list_descendants(os.getpid())
        if not left:
            return
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(TICK_S)


def _reap_orphans(keep: int) -> None:
    """Collect ended orphans handed to us; `keep` is left for its Popen to collect."""
    for process in _map_children().get(os.getpid(), ()):
        if process != keep:
            with suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)


def _list_descendants(root: int) -> list[int]:
    """Every live process below `root`; empty where there is no /proc."""
    children = _map_children()
    found = list(children.get(root, ()))
    for process in found:  # which grows meanwhile
        found += children.get(process, ())
    return found


def _map_children() -> dict[int, list[int]]:
    """Parent -> children, over all processes of the machine that /proc shows."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the command name, in parentheses, may itself hold spaces and parentheses
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    return children


if __name__ == "__main__":
    grace_s, _, *command = sys.argv[1:]
    sys.exit(supervise_command(command, float(grace_s)))
