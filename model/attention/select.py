"""Which attention backend runs, and why. The start-up line prints the answer.

Own kernels come first on CUDA: where each query head has keys of its own, as in Qwen2-Audio, FlashAttention's decode
fills one row of a tile of 64 or 128 (docs/decisions.md). Whoever measures otherwise names another.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from model.attention.base import AttentionBackend
from model.attention.cpu import CpuBackend
from model.attention.flash_attn import FlashAttentionBackend
from model.attention.flash_attn_3 import FlashAttention3Backend
from model.attention.needs import AttentionNeeds, Unavailable
from model.attention.reference import ReferenceBackend
from model.attention.torch_varlen import TorchVarlenBackend
from model.attention.triton import TritonBackend
from model.compiled import parallel_region
from model.errors import ConfigError
from model.triton_kernels.language import IS_INSTALLED

AMPERE = (8, 0)
ADA = (8, 9)
"""The first that converts float8."""
HOPPER = 9
SMALLEST_HEAD_DIM = 16
PAGING_TORCH = (2, 13)
Choice = tuple[AttentionBackend, str]
"""A backend, and what speaks for it."""


def select_backend(
    name: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dims: tuple[int, ...] = (),
    fp8_kv: bool = False,
) -> Choice:
    """Resolve `--attention-backend`. -> (backend, reason). Raises ConfigError for one that cannot run here.

    dtype: of weights and activations; head_dims: of the model's towers; fp8_kv: whether the cache is in float8.
    """
    needs = AttentionNeeds(device, dtype, head_dims, fp8_kv)
    if name == "auto":
        return _first_available(needs)
    if name not in BACKENDS:
        raise ConfigError(f"attention backend {name!r} is not known; choose auto, {', '.join(BACKENDS)}")
    try:
        backend, reason = BACKENDS[name](needs)
    except Unavailable as problem:
        raise ConfigError(f"attention backend {name!r} is not available: {problem}") from None
    return backend, f"asked for; {reason}"


def _first_available(needs: AttentionNeeds) -> Choice:
    """The best that can run; the reason tells what the better ones lack."""
    lacking = []
    for name in ("triton", "flash_attn", "torch_varlen") if needs.device.type == "cuda" else ("cpu",):
        try:
            backend, reason = BACKENDS[name](needs)
        except Unavailable as problem:
            lacking.append(f"{name} is not available: {problem}")
        else:
            return backend, "; ".join((reason, *lacking))
    backend, reason = BACKENDS["reference"](needs)
    return backend, "; ".join((reason, *lacking))


def _triton(needs: AttentionNeeds) -> Choice:
    needs.require_cuda(ADA if needs.fp8_kv else AMPERE)
    if not IS_INSTALLED:
        raise Unavailable("the package triton is not installed")
    if odd := [dim for dim in needs.head_dims if dim < SMALLEST_HEAD_DIM or dim & (dim - 1)]:
        raise Unavailable(f"its kernels take heads of a power of two from {SMALLEST_HEAD_DIM} up, not of {odd[0]}")
    return TritonBackend(), "own kernels"


def _cpu(needs: AttentionNeeds) -> Choice:
    if needs.device.type != "cpu":
        raise Unavailable(f"it runs on a CPU, not on {needs.device.type}")
    if not parallel_region():
        raise Unavailable("this build of torch does not use GCC's OpenMP runtime")
    return CpuBackend(), "compiled for this CPU"


def _flash_attn(needs: AttentionNeeds) -> Choice:
    """FlashAttention 3 where it is installed on a GPU that it is made for, else 2."""
    needs.require_flash()
    lacking = ""
    if torch.cuda.get_device_capability(needs.device)[0] == HOPPER:
        try:
            return FlashAttention3Backend(_load("flash_attn_interface", "FlashAttention 3")), "made for this GPU"
        except Unavailable as problem:
            lacking = f"; {problem}"
    package = _load("flash_attn", "flash-attn", ": pip install --no-build-isolation .[flash]")
    return FlashAttentionBackend(package), f"flash-attn {package.__version__}{lacking}"


def _torch_varlen(needs: AttentionNeeds) -> Choice:
    needs.require_flash()
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < PAGING_TORCH:
        raise Unavailable(
            f"varlen_attn reads a paged cache from torch 2.13 on, with torch {torch.__version__} it could serve the "
            "encoder alone"
        )
    return TorchVarlenBackend(), f"FlashAttention 2 as built into torch {torch.__version__}"


BACKENDS: dict[str, Callable[[AttentionNeeds], Choice]] = {
    "triton": _triton,
    "flash_attn": _flash_attn,
    "torch_varlen": _torch_varlen,
    "cpu": _cpu,
    "reference": lambda _: (ReferenceBackend(), "plain torch"),
}


def _load(module: str, title: str, remedy: str = "") -> ModuleType:
    """An optional package. Raises Unavailable that tells whether it is missing or broken."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            raise Unavailable(f"{title} is not installed{remedy}") from None
        raise Unavailable(f"{title} cannot be imported: {error}") from None
