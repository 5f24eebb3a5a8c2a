"""Tensor parallelism: which part of the decoder a rank holds, and what the ranks tell each other within a step.

Each rank has some of the attention heads, some of the feed-forward columns and some of the vocabulary. Products that
read all of their input need nothing of others; those that read a part of it are summed over the ranks, twice in a
layer. The encoder and the sampler are on rank 0 alone. A `Shard` is an argument like any other; the one global is
torch.distributed's own default group, which `join_group` makes and `leave_group` ends. With one rank nothing of this
runs.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import TextConfig
from model.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of `size`. What it sends and receives waits for the device only on a CPU."""

    rank: int = 0
    size: int = 1

    def part(self, total: int) -> int:
        """A rank's share of `total`, which divides evenly."""
        assert total % self.size == 0, "see `share`"
        return total // self.size

    def share(self, config: TextConfig) -> TextConfig:
        """The decoder that a rank computes: fewer heads and columns, all of the hidden width and the vocabulary.

        Raises ConfigError when something does not divide evenly.
        """
        for what in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
            if getattr(config, what) % self.size:
                raise ConfigError(
                    f"--tensor-parallel-size {self.size} does not divide the checkpoint's {what}, "
                    f"{getattr(config, what)}"
                )
        return replace(
            config,
            num_attention_heads=self.part(config.num_attention_heads),
            num_key_value_heads=self.part(config.num_key_value_heads),
            intermediate_size=self.part(config.intermediate_size),
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place, the same bits on each."""
        if self.size > 1 and x.numel():
            dist.all_reduce(x)
        return x

    def broadcast(self, x: Tensor) -> None:
        """Rank 0's values, in place."""
        if self.size > 1:
            dist.broadcast(x, 0)

    def gather_columns(self, x: Tensor) -> Tensor:
        """On rank 0 the ranks' columns side by side; on others what they gave. x: [B, V / size] -> [B, V]."""
        if self.size == 1:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, 0)
        return x if parts is None else torch.cat(parts, dim=-1)

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values. Waits for the device: for start-up."""
        if self.size == 1:
            return value
        smallest = torch.tensor(value, device=device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest.item())


WHOLE = Shard()
"""The only rank."""


def join_group(shard: Shard, listener: socket.socket | int, device: torch.device, timeout_s: float) -> None:
    """Meet the other ranks at a loopback port: rank 0 brings the socket that listens there, the others its number.

    Whoever waits longer than `timeout_s` for another, now or in a step, raises RuntimeError, or on CUDA ends.
    """
    timeout = timedelta(seconds=timeout_s)
    if isinstance(listener, socket.socket):
        port, master_fd = listener.getsockname()[1], listener.detach()
    else:
        port, master_fd = listener, None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1",
        port,
        shard.size,
        is_master=master_fd is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=master_fd,
    )
    on_cuda = device.type == "cuda"
    with _loopback_only():
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=store,
            rank=shard.rank,
            world_size=shard.size,
            timeout=timeout,
            device_id=torch.device("cuda", torch.cuda.current_device()) if on_cuda else None,
        )
        dist.all_reduce(torch.zeros(1, device=device))  # connections are made, by whom that is lazy about it


def leave_group() -> None:
    """End what `join_group` began, if it has."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Connections that are made meanwhile stay on this machine."""
    interface = "lo0" if sys.platform == "darwin" else "lo"
    wanted = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
