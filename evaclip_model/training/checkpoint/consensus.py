"""Decisions that all ranks make alike, or one alone: results exchanged, one rank's failure made
everybody's."""

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch.distributed as dist
from torch import Tensor

from evaclip_model.errors import InputError

T = TypeVar("T")
SLOWEST = timedelta(hours=6)
"""Longest wait of ranks for each other when files are written; a dead rank is noticed at once."""


@dataclass(frozen=True)
class Peers:
    """The ranks of a process group."""

    rank: int
    count: int
    group: dist.ProcessGroup | None = None
    """None: the default one."""

    @classmethod
    def every_rank(cls) -> Self:
        """Every rank, over the default group."""
        if not dist.is_initialized():
            return cls(0, 1)
        return cls(dist.get_rank(), dist.get_world_size())

    @classmethod
    def own_group(cls) -> Self:
        """Every rank, over a gloo group of its own, which another thread may use; every rank has to
        call this at the same point."""
        peers = cls.every_rank()
        own = dist.new_group(backend="gloo", timeout=SLOWEST) if peers.count > 1 else None
        return replace(peers, group=own)

    def add_up(self, tensor: Tensor) -> Tensor:
        """Put the sum over ranks in the place of a tensor [...], and return it."""
        if self.count > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather_values(self, value: T) -> list[T]:
        """Exchange a value; those of every rank, in order of ranks."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def run_everywhere(self, action: Callable[[], T]) -> list[T]:
        """Results of every rank's own `action`. Raises what this rank's action raised; or, when
        another's did, its InputError or OSError, or an OSError that tells of another error."""
        own: Exception | None = None
        result: Any = None
        try:
            result = action()
        except Exception as error:
            own = error
        outcomes = self.gather_values((result, None if own is None else _sendable_error(own)))
        for told in (own, *(told for _, told in outcomes)):
            if told is not None:
                raise told
        return [result for result, _ in outcomes]

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
