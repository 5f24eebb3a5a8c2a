"""Ranks that are threads of one process: what a shard computes is compared without processes or sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from model.parallel import Shard

T = TypeVar("T")

WAIT_SECONDS = 30


class Meeting:
    """Where the ranks exchange values, all of them in each exchange."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self._values: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        """-> every rank's value."""
        self._values[rank] = value.clone()
        self.barrier.wait(WAIT_SECONDS)
        values = self._values.copy()
        self.barrier.wait(WAIT_SECONDS)
        return values


@dataclass(frozen=True)
class ThreadShard(Shard):
    """A rank that is a thread."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self.meeting.exchange(self.rank, x)).sum(0))

    def broadcast(self, x: Tensor) -> None:
        x.copy_(self.meeting.exchange(self.rank, x)[0])

    def gather_columns(self, x: Tensor) -> Tensor:
        parts = self.meeting.exchange(self.rank, x)
        return torch.cat(parts, dim=-1) if self.rank == 0 else x

    def minimum(self, value: int, device: torch.device) -> int:
        return int(torch.stack(self.meeting.exchange(self.rank, torch.tensor(value))).min())


def on_ranks(size: int, function: Callable[[Shard], T]) -> list[T]:
    """Call a function on each rank at once. -> what each gave."""
    meeting = Meeting(size)

    def run(rank: int) -> T:
        try:
            with torch.inference_mode():
                return function(ThreadShard(rank, size, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(run, rank) for rank in range(size)]
    for error in (rank.exception() for rank in ranks):
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error  # the others only wait in vain for the one that failed
    return [rank.result() for rank in ranks]
