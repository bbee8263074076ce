"""Decisions that all ranks make alike, or one alone: results exchanged, one rank's failure made
everybody's."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from evaclip_model.errors import InputError

T = TypeVar("T")
SLOWEST = timedelta(hours=6)
"""Longest wait of ranks for each other when files are written; a dead rank is noticed at once."""


@dataclass(frozen=True)
class Peers:
    """The ranks of a process group."""

    rank: int
    count: int
    group: dist.ProcessGroup | None
    """None: the default one."""

    @classmethod
    def every_rank(cls) -> Peers:
        """Every rank, over the default group."""
        if not dist.is_initialized():
            return cls(0, 1, None)
        return cls(dist.get_rank(), dist.get_world_size(), None)

    @classmethod
    def own_group(cls) -> Peers:
        """Every rank, over a gloo group of its own, which another thread may use; every rank has to
        call this at the same point."""
        everybody = cls.every_rank()
        if everybody.count == 1:
            return everybody
        return cls(everybody.rank, everybody.count, dist.new_group(backend="gloo", timeout=SLOWEST))

    def gather_values(self, value: T) -> list[T]:
        """Exchange a value; those of every rank, in order of ranks."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def run_everywhere(self, action: Callable[[], T]) -> list[T]:
        """Results of every rank's own `action`.

        Raises: Exception: what this rank's action raised; or, when another's did, its InputError or
            OSError, or an OSError that tells of another kind of error.
        """
        own: Exception | None = None
        result: T | None = None
        try:
            result = action()
        except Exception as error:
            own = error
        outcomes = self.gather_values((result, None if own is None else _sendable_error(own)))
        if own is not None:
            raise own
        for _, told in outcomes:
            if told is not None:
                raise told
        results: list[Any] = [result for result, _ in outcomes]
        return results

    def run_on_first(self, action: Callable[[], T]) -> T:
        """Result of `action`, which rank 0 alone does; errors as in `run_everywhere`."""
        result: Any = self.run_everywhere(lambda: action() if self.rank == 0 else None)[0]
        return result  # type: ignore[no-any-return]


def _sendable_error(error: Exception) -> Exception:
    if isinstance(error, InputError):
        return InputError(str(error))
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, str(error.strerror), str(error.filename or ""))
    return OSError(errno.EIO, f"{type(error).__name__}: {error}")
