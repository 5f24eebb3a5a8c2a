"""What a model that has been loaded onto a CPU becomes before it serves: packed weights, compiled layers."""

from __future__ import annotations

import torch

from model import gemm_cpu
from model.attention.dense_cpu import DenseAttention
from model.attention.paged_cpu import PagedAttention
from model.compiled import parallel_region
from model.fused_cpu import rms_norm, swiglu
from model.layers import RMSNorm, SwiGlu
from model.linear import Linear
from model.one_token_cpu import OneTokenPass, can_run
from model.one_token_cpu import compile_kernels as compile_one_token
from model.qwen2_audio import Qwen2Audio


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN keeps weights of this precision in its own layout: float16 and, before AVX-512, bfloat16 it
    packs only for CPUs that multiply them. Layers stay as they are loaded otherwise."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def prepare_for_cpu(model: Qwen2Audio, *, int8: bool = False) -> None:
    """Change layers in place. `int8`: the decoder's products with few rows read weights of 8 bits."""
    if not can_pack(model.dtype):
        return
    of_decoder = {*model.decoder.modules(), model.lm_head}
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack(int8=int8 and module in of_decoder)
        elif model.dtype == torch.bfloat16 and parallel_region():
            if isinstance(module, RMSNorm):
                module.kernel = rms_norm
            elif isinstance(module, SwiGlu):
                module.kernel = swiglu
    attends_so = model.backend.name == "cpu"  # whoever asks for another attention gets it
    if attends_so and model.shard.size == 1 and can_run(model.decoder):
        model.decoder.one_token = OneTokenPass(model.decoder)


def compile_kernels(head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    """Compile, once for a process, what the first step would wait seconds for."""
    if parallel_region():
        PagedAttention(head_dim, block_size, dtype)
        compile_one_token(dtype == torch.bfloat16)
        if dtype == torch.bfloat16 and gemm_cpu.can_run():
            DenseAttention()
