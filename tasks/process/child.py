"""Another process that never outlives the one that asked for it: a command under supervise.py."""

import errno
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.process import supervise

CHECKOUT = Path(supervise.__file__).resolve().parents[2]
MARK = "EVACLIP_SUPERVISED"
"""Environment variable by which a command's processes are known if their supervisor is killed."""
KILL_MARGIN_S = 15.0
"""How long past its grace a supervisor may take to kill and collect what is left."""


def run_supervised(
    command: Sequence[str],
    *,
    log: Path,
    grace_s: float,
    env: Mapping[str, str] | None = None,
    poll: Callable[[], None] | None = None,
    poll_s: float = 0.5,
) -> int:
    """Run `command` to its end; return its exit status (128 + N if signal N ended it).

    `poll` is called every `poll_s` seconds; whatever it raises, KeyboardInterrupt included, stops
    the command and everything it started before it goes on.
    """
    with start_supervised(command, log=log, grace_s=grace_s, env=env) as process:
        while True:
            try:
                return process.wait(poll_s)
            except subprocess.TimeoutExpired:
                if poll is not None:
                    poll()


def refuse_full_disk(log: Path) -> None:
    """Raise the OSError of a full disk if the end of a command's log speaks of one."""
    if os.strerror(errno.ENOSPC) in log.read_text(errors="replace")[-100_000:]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(log.parent))


@contextmanager
def start_supervised(
    command: Sequence[str], *, log: Path, grace_s: float, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` (`sys.executable -m tasks.x` works anywhere) beside the caller, appending
    its output to `log`; at the end of the block nothing of it is left.

    `grace_s` are the seconds between SIGTERM and SIGKILL; `env` replaces the caller's environment.
    """
    mark = uuid.uuid4().hex
    settings = os.environ if env is None else env
    paths = [str(CHECKOUT), *filter(None, [settings.get("PYTHONPATH")])]
    log.parent.mkdir(parents=True, exist_ok=True)
    # -S -P -E: the supervisor needs nothing but the standard library, and must start at once
    supervisor = [sys.executable, "-SPE", supervise.__file__, str(grace_s), "--"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*supervisor, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**settings, "PYTHONPATH": os.pathsep.join(paths), MARK: mark},
        )
    try:
        yield process
    finally:
        _stop_supervisor(process, grace_s)
        wanted = f"{MARK}={mark}".encode()
        for environ in Path("/proc").glob("[0-9]*/environ") if process.returncode < 0 else ():
            with suppress(OSError):  # what a killed supervisor can no longer kill
                if wanted in environ.read_bytes().split(b"\0"):
                    os.kill(int(environ.parent.name), signal.SIGKILL)


def _stop_supervisor(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End of file at its stdin tells the supervisor to stop; a second ctrl-C ends its grace."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(grace_s + KILL_MARGIN_S)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait(KILL_MARGIN_S)
        raise
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
