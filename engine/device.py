"""Which device and which precision, each with the reason that the start-up line prints; and the ways there and back.

While the device computes, the host prepares what comes next. So nothing is ever copied such that the host waits for
work that was queued before: what goes there is pinned first, and what comes back is waited for by an event.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import EngineStartError
from model.parallel import WHOLE, Shard

GPU_TOKEN_BUDGET = 1024
CPU_TOKEN_BUDGET = 512
"""More gains no throughput on either, and lets those that decode wait longer."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_device(name: str, shard: Shard = WHOLE) -> torch.device:
    """`auto`, `cuda` or `cpu` -> a device. Raises EngineStartError when it is not there.

    With several ranks, each has a GPU of its own, from now on its process's current one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineStartError("--device cuda: torch sees no CUDA device here; use --device cpu or mend the driver")
    if name == "cuda" and shard.size > 1:
        if shard.size > (visible := torch.cuda.device_count()):
            raise EngineStartError(f"--tensor-parallel-size {shard.size}: torch sees {visible} CUDA device(s) here")
        torch.cuda.set_device(shard.rank)
    return torch.device(name)


def resolve_dtype(name: str, stored: str, device: torch.device) -> tuple[torch.dtype, str]:
    """`auto` or a name -> (dtype, reason). `stored` is the checkpoint's precision."""
    if name != "auto":
        return DTYPES[name], "asked for"
    if stored not in DTYPES:
        raise EngineStartError(f"the checkpoint's dtype {stored!r} is unknown; name one with --dtype")
    if device.type == "cuda" or stored == "float32":
        return DTYPES[stored], "as stored"
    if stored == "bfloat16" and _cpu_multiplies_bfloat16():
        return torch.bfloat16, "as stored; this CPU multiplies bfloat16 natively"
    return torch.float32, f"this CPU is faster in float32 than in the stored {stored}"


def resolve_token_budget(wanted: int | None, device: torch.device) -> tuple[int, str]:
    """-> (most tokens of a step, reason). The defaults were chosen by simulation: see docs/capacity.md."""
    if wanted is not None:
        return wanted, "asked for"
    if device.type == "cuda":
        return GPU_TOKEN_BUDGET, "default of a GPU"
    return CPU_TOKEN_BUDGET, "default of a CPU"


def _cpu_multiplies_bfloat16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # before torch 2.13


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """An array or a list on the device, without waiting for what runs there. On a CPU an array may be shared."""
    shared = isinstance(values, np.ndarray) and values.flags.writeable and dtype is None
    tensor = torch.from_numpy(values) if shared else torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def copy_into(target: Tensor, values: np.ndarray) -> None:
    """Fill a tensor of the device, in stream order, without waiting for what runs there."""
    source = torch.from_numpy(values)
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


def free_bytes(device: torch.device) -> int:
    """What nobody has of the device's memory. 0 on a CPU, where it is not counted."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


class DeviceStopwatch:
    """How long what is queued between its making and `stop` takes the device."""

    def __init__(self, device: torch.device) -> None:
        self.began = time.monotonic()
        """When it was queued; on a CPU, when it ran."""
        self._ended = self.began
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            self._events = begin, end

    def stop(self) -> None:
        """Once."""
        self._ended = time.monotonic()
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """Waits for the device."""
        if not self._events:
            return self._ended - self.began
        begin, end = self._events
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


class HostCopy:
    """Tensors on their way from the device: the copies are queued at once, `wait` is for when they are needed."""

    def __init__(self, *tensors: Tensor) -> None:
        """At least one, all of one device."""
        self._copied: torch.cuda.Event | None = None
        if tensors[0].device.type != "cuda":
            self._tensors = tensors
            return
        self._tensors = tuple(
            torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        )
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def wait(self) -> tuple[Tensor, ...]:
        """On the CPU, in the order in which they were given."""
        if self._copied:
            self._copied.synchronize()
        return self._tensors
