"""What a model asks of its attention, and what is said where a backend does not have it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_CAPABILITY = (8, 0)
FLASH_HEAD_DIM = 256


class Unavailable(Exception):
    """A backend cannot run here. Its text is one clause that says why, and what would help."""


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """Of one model on one device."""

    device: torch.device
    dtype: torch.dtype
    """Of weights and activations."""
    head_dims: tuple[int, ...] = ()
    """D of each of its towers."""
    fp8_kv: bool = False
    """Whether keys and values are kept in float8."""

    def require_cuda(self, capability: tuple[int, int]) -> None:
        """Raises Unavailable on another device, or an older GPU."""
        if self.device.type != "cuda":
            raise Unavailable(f"it runs on CUDA, not on {self.device.type}")
        if (ours := torch.cuda.get_device_capability(self.device)) < capability:
            raise Unavailable(
                f"it needs compute capability {capability[0]}.{capability[1]}, this GPU has {ours[0]}.{ours[1]}"
            )

    def require_flash(self) -> None:
        """What all of FlashAttention's kernels ask for. Raises Unavailable."""
        self.require_cuda(FLASH_CAPABILITY)
        if self.fp8_kv:
            raise Unavailable("its kernels read no float8 cache with scales of its own; triton does")
        if self.dtype not in FLASH_DTYPES:
            name = str(self.dtype).removeprefix("torch.")
            raise Unavailable(f"its kernels compute in float16 and bfloat16, not in {name}")
        if odd := [dim for dim in self.head_dims if dim % 8 or dim > FLASH_HEAD_DIM]:
            raise Unavailable(f"its kernels take heads of a multiple of 8 up to {FLASH_HEAD_DIM}, not of {odd[0]}")
