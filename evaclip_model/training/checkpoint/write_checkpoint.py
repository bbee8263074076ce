"""Saving checkpoints from all ranks, beside the training or while it waits: copies in host memory,
the thread that writes them, the barriers before a checkpoint gets its name, retention."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from evaclip_model.training.checkpoint.consensus import Peers
from evaclip_model.training.checkpoint.storage import Place, place_of
from evaclip_model.training.engine.engine import StateFragment
from evaclip_model.weights.checkpoint_format import (
    CheckpointManifest,
    ShardFile,
    TrainingProgress,
    key_of,
    list_retired,
    write_shard,
)


class CheckpointWriter:
    """Saves in a thread: training waits only while a GPU's state is copied to host memory.

    State that lies there is copied beside the next step's gradient; `settle` waits for that.

    Every rank makes one at the same point and calls the same methods in the same order. The threads
    agree over a process group of their own, so no exchange of the training is in their way.
    """

    def __init__(
        self, location: Path | str, keep: int, *, keep_every_steps: int | None = None
    ) -> None:
        """Clears away what killed runs left unfinished; only one run may use a location.

        Args:
            location: a folder that all ranks share, or a URL that fsspec knows.
            keep: newest checkpoints that stay; multiples of `keep_every_steps` stay for good.

        Raises:
            InputError: nothing installed knows this kind of URL.
            OSError: the location cannot be used.
        """
        self._target = _Target(place_of(location), Peers.own_group(), keep, keep_every_steps)
        self._target.peers.run_on_first(self._target.place.remove_leftovers)
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._settled = threading.Event()
        self._settled.set()

    def allocate_copies(self, fragments: Iterable[StateFragment]) -> None:
        """Set aside the memory for copies of `fragments`, so that the first save does not."""
        for key, tensor in _tensors_by_key(fragments).items():
            self._copy_of(key, tensor).zero_()  # memory is there when it was written to

    def begin_save(self, fragments: Iterable[StateFragment], progress: TrainingProgress) -> None:
        """Begin to copy the state and to write it; waits for the save before, if it goes on. Call
        `wait_for_copy` before the state is changed.

        Raises: InputError, OSError: of the save before, the same on every rank.
        """
        self.wait_for_save()
        state = _tensors_by_key(fragments)
        here = {key: tensor for key, tensor in state.items() if not tensor.is_cuda}
        held = {key: self._copy_tensor(key, state[key]) for key in state.keys() - here.keys()}
        if held:
            torch.cuda.synchronize()  # copies to pinned memory go on after their call
        self._settled.clear()
        self._thread = threading.Thread(
            target=self._write_in_background,
            args=(here, held, progress),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Return when the state of the last save is copied, and may be changed."""
        self._settled.wait()

    def has_failed(self) -> bool:
        """True when the last save has failed, as far as this rank knows; never waits.

        Ranks learn it at different times: exchange it with the step's other flags, and where it is
        true on some rank, let all of them `wait`, which raises the error on every rank.
        """
        return self._error is not None

    def wait_for_save(self) -> None:
        """Return when the last save is whole, or was so before.

        Raises: InputError, OSError: it failed, the same on every rank; earlier checkpoints are
            there.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """`wait`, and let go of the copies."""
        self.wait_for_copy()
        self._copies.clear()
        self.wait_for_save()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        with suppress(Exception):  # the error that is under way tells more
            self.close()

    def _write_in_background(
        self, here: Mapping[str, Tensor], held: Mapping[str, Tensor], progress: TrainingProgress
    ) -> None:
        try:
            try:
                copies = {key: self._copy_tensor(key, tensor) for key, tensor in here.items()}
            finally:
                self._settled.set()
            self._target.write_shard({**held, **copies}, progress)
        except Exception as error:  # it is raised where the training waits
            self._error = error

    def _copy_tensor(self, key: str, tensor: Tensor) -> Tensor:
        return self._copy_of(key, tensor).copy_(tensor.detach(), non_blocking=True)

    def _copy_of(self, key: str, tensor: Tensor) -> Tensor:
        held = self._copies.get(key)
        if held is None or held.shape != tensor.shape:
            self._copies[key] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )
        return self._copies[key]


def save_checkpoint(
    location: Path | str, fragments: Iterable[StateFragment], progress: TrainingProgress, keep: int
) -> None:
    """Write a checkpoint together with all other ranks, and wait until it is whole; without memory
    of its own for fragments that lie in host memory.

    Raises: InputError, OSError: it cannot be written, the same on every rank.
    """
    held = {key: tensor.detach().cpu() for key, tensor in _tensors_by_key(fragments).items()}
    _Target(place_of(location), Peers.every_rank(), keep, None).write_shard(held, progress)


@dataclass(frozen=True)
class _Target:
    """The place of a run's checkpoints, the ranks that write them, and the number that stays."""

    place: Place
    peers: Peers
    keep: int
    keep_every_steps: int | None

    def write_shard(self, tensors: Mapping[str, Tensor], progress: TrainingProgress) -> None:
        """Write this rank's shard; when all are on disk, rank 0 makes them a checkpoint."""
        self.peers.run_on_first(lambda: self.place.clear_unpublished(progress.step))
        try:
            shards = self.peers.run_everywhere(lambda: self._write_shard(tensors, progress.step))
            manifest = CheckpointManifest(tuple(shards), progress).to_text()
            self.peers.run_on_first(lambda: self.place.publish_checkpoint(progress.step, manifest))
        except Exception:
            if self.peers.rank == 0:
                with suppress(OSError):  # a full disk gets its room back
                    self.place.clear_unpublished(progress.step)
            raise
        self.peers.run_on_first(lambda: self._remove_old(progress.step))

    def _write_shard(self, tensors: Mapping[str, Tensor], step: int) -> ShardFile:
        name = f"shard-{self.peers.rank}.safetensors"
        with self.place.create_file(step, name) as file:
            return ShardFile(name, *write_shard(file, tensors))

    def _remove_old(self, newest: int) -> None:
        for step in list_retired(self.place.list_steps(), newest, self.keep, self.keep_every_steps):
            self.place.remove_checkpoint(step)


def _tensors_by_key(fragments: Iterable[StateFragment]) -> dict[str, Tensor]:
    return {
        key_of(fragment.name, fragment.offset, kind): tensor
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    }
