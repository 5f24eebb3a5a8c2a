"""Which precision weights, keys and values are kept in, where that is not the one that is computed in."""

from __future__ import annotations

import torch

from engine.errors import EngineStartError
from engine.messages import EngineArgs
from model.attention import AttentionBackend
from model.cpu import can_pack
from model.triton_kernels.language import IS_INSTALLED

FP8_CAPABILITY = (8, 9)
"""The first GPUs that multiply float8 (Ada); Hopper's have 9.0."""


def keeps_kv_in_fp8(args: EngineArgs, backend: AttentionBackend) -> bool:
    """Resolve `--kv-cache-dtype`. Raises EngineStartError when the attention backend cannot."""
    if args.kv_cache_dtype == "auto":
        return False
    if args.kv_cache_dtype not in ("fp8", "fp8_e4m3"):
        raise EngineStartError(f"--kv-cache-dtype {args.kv_cache_dtype}: choose auto or fp8, which is fp8_e4m3")
    if not backend.supports_fp8_kv:
        raise EngineStartError(
            f"--kv-cache-dtype {args.kv_cache_dtype}: the attention backend {backend.name} cannot read it; "
            "choose another with --attention-backend"
        )
    return True


def keeps_int4_packed(args: EngineArgs, device: torch.device) -> bool:
    """Whether there are kernels for a checkpoint's weights of four bits."""
    return device.type == "cuda" and args.quantization is None and IS_INSTALLED


def check_quantization(args: EngineArgs, device: torch.device, dtype: torch.dtype) -> None:
    """Raises EngineStartError when `--quantization` cannot be honoured on this device in this precision."""
    if args.quantization == "int8" and device.type != "cpu":
        raise EngineStartError("--quantization int8 is for --device cpu; a GPU takes fp8")
    if args.quantization == "int8" and not can_pack(dtype):
        name = str(dtype).removeprefix("torch.")
        raise EngineStartError(f"--quantization int8: this CPU has no such products in {name}; use --dtype float32")
    if args.quantization != "fp8":
        return
    if device.type != "cuda":
        raise EngineStartError("--quantization fp8 is for --device cuda; a CPU takes int8")
    if torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise EngineStartError("--quantization fp8: this GPU does not multiply float8; 8.9 is the first")
    if dtype != torch.bfloat16:
        raise EngineStartError("--quantization fp8 computes in bfloat16; leave --dtype at auto or name that")
