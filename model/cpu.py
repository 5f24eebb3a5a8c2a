"""What a model that has been loaded onto a CPU becomes before it serves: packed weights, compiled norms."""

from __future__ import annotations

import torch

from model.attention.paged_cpu import PagedAttention
from model.compiled import parallel_region
from model.layers import RMSNorm
from model.linear import Linear
from model.qwen2_audio import Qwen2Audio
from model.rms_norm_cpu import rms_norm


def prepare_for_cpu(model: Qwen2Audio, *, int8: bool = False) -> None:
    """Change layers in place. `int8`: the decoder's products with few rows read weights of 8 bits."""
    if model.dtype == torch.float16:
        return  # oneDNN packs it only for CPUs that multiply it
    of_decoder = {*model.decoder.modules(), model.lm_head}
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack(int8=int8 and module in of_decoder)
        elif isinstance(module, RMSNorm) and model.dtype == torch.bfloat16 and parallel_region():
            module.kernel = rms_norm


def compile_kernels(head_dim: int, block_size: int) -> None:
    """Compile, once for a process, what the first step would wait seconds for."""
    if parallel_region():
        PagedAttention(head_dim, block_size)
        rms_norm(torch.zeros(1, 1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16), 1.0)
