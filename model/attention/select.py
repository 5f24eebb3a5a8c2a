"""Which attention backend runs, and why. The start-up line prints the answer."""

from __future__ import annotations

import torch

from model.attention.base import AttentionBackend
from model.attention.cpu import CpuBackend
from model.attention.reference import ReferenceBackend
from model.compiled import parallel_region
from model.errors import ConfigError


def select_backend(name: str, device: torch.device) -> tuple[AttentionBackend, str]:
    """Resolve `--attention-backend`. -> (backend, reason). Raises ConfigError for one that cannot run here."""
    if name not in ("auto", "reference", "cpu"):
        raise ConfigError(f"attention backend {name!r} is not available; choose auto, reference or cpu")
    if name == "reference":
        return ReferenceBackend(), "asked for"
    problem = _cpu_problem(device)
    if problem is None:
        return CpuBackend(), "asked for" if name == "cpu" else "compiled for this CPU"
    if name == "cpu":
        raise ConfigError(f"attention backend 'cpu' is not available: {problem}")
    return ReferenceBackend(), f"plain torch: {problem}"


def _cpu_problem(device: torch.device) -> str | None:
    """Why the compiled CPU kernel cannot run. None when it can."""
    if device.type != "cpu":
        return f"no kernel for {device.type} has been built so far"
    return None if parallel_region() else "this build of torch does not use GCC's OpenMP runtime"
