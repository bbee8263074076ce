"""Reading and decoding in processes of their own, ahead of the training.

A worker is a rank within the rank: it owns an equal run of the rank's lanes and makes their part of
every step, so how many there are changes no batch and no shard is read twice. Images come in memory
shared with the rank, a ring of `SLOTS` steps; captions and counts in a line of JSON. A worker whose
rank is gone reads the end of its standard input, or fails to write, and ends.
"""

import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaclip_model.errors import InputError

SLOTS = 3
"""Steps that a worker may be ahead of its rank."""
END_S = 10.0
"""Seconds for a worker to end once its input is closed."""
_GO = b"."


class Origin(NamedTuple):
    """Origin of a sample of a batch."""

    shard: str
    """Path of its tar, relative to the manifest."""
    key: str
    image: int
    """`number_bytes` of its stored image."""


class Part(NamedTuple):
    """A worker's part of a step."""

    images: Tensor
    """[b, 3, S, S] uint8, in shared memory until the next part is asked for."""
    captions: Sequence[str]
    origins: Sequence[Origin]
    bad: Mapping[str, int]


class WorkerFailed(RuntimeError):
    """A worker ended without a reason of the user's making; its standard error says why."""


class Worker:
    """One worker, seen from its rank."""

    def __init__(
        self, program: Sequence[str], settings: Mapping[str, Any], shape: tuple[int, ...]
    ) -> None:
        """Start `program`, which calls `serve_parts`, with `settings` of JSON's types and the
        part's image shape [b, 3, S, S]; its first parts are made at once."""
        memory = os.memfd_create("evaclip-images")
        os.ftruncate(memory, SLOTS * int(np.prod(shape)))
        try:
            self._process = subprocess.Popen(
                program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[memory]
            )
            self._slots = _allocate_slots(memory, shape)
        finally:
            os.close(memory)
        self._taken = 0
        sent = json.dumps({"memory": memory, "shape": shape, **settings})
        self._send_message(sent.encode() + b"\n" + _GO * SLOTS)

    def receive_part(self) -> Part:
        """The next step's part, once it is there; raises InputError as the reader would, and
        WorkerFailed."""
        if self._taken:
            self._send_message(_GO)  # the slot of the part before is free again
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise WorkerFailed(f"a reading process ended with status {self._process.wait()}")
        said = json.loads(line)
        if "error" in said:
            raise InputError(said["error"])
        images = self._slots[self._taken % SLOTS]
        self._taken += 1
        origins = [Origin(*origin) for origin in said["origins"]]
        return Part(images, said["captions"], origins, said["bad"])

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send_message(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(
                f"a reading process ended with status {self._process.wait()}"
            ) from None


def serve_parts(run: Callable[[Mapping[str, Any]], Any]) -> int:
    """Be a worker: make parts of `run(settings)`, an iterable of batches, as fast as there is room;
    returns the exit code."""
    # Ctrl-C and a launcher's SIGTERM reach the whole group; the rank still saves a checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not an answer
    torch.set_num_threads(1)
    settings = json.loads(sys.stdin.buffer.readline())
    slots = _allocate_slots(settings["memory"], settings["shape"])

    def send_answer(**said: Any) -> None:
        answers.write(json.dumps(said).encode() + b"\n")
        answers.flush()

    try:
        for number, (batch, bad) in enumerate(run(settings)):
            if not sys.stdin.buffer.read(1):
                break
            slots[number % SLOTS].copy_(batch.images)
            send_answer(captions=batch.captions, origins=batch.origins, bad=bad)
    except InputError as error:
        send_answer(error=str(error))
    except BrokenPipeError:
        pass  # the rank is gone
    return 0


def _allocate_slots(memory: int, shape: Sequence[int]) -> list[Tensor]:
    """Tensors of a shape [b, 3, S, S] in shared memory, where the channels come last."""
    images, channels, height, width = shape
    size = int(np.prod(shape))
    mapped = mmap.mmap(memory, SLOTS * size)
    return [
        torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=number * size)
        .view(images, height, width, channels)
        .permute(0, 3, 1, 2)
        for number in range(SLOTS)
    ]
