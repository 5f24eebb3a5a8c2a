"""What a model that has been loaded onto a GPU becomes before it serves: small layers take fused kernels."""

from __future__ import annotations

from model.layers import RMSNorm, SwiGlu
from model.qwen2_audio import Qwen2Audio
from model.triton_kernels.add_rms_norm import add_rms_norm, rms_norm
from model.triton_kernels.language import reaches
from model.triton_kernels.swiglu import swiglu


def prepare_for_cuda(model: Qwen2Audio) -> None:
    """Install kernels in place, where Triton is. With the backend `reference` all stays plain torch: the oracle."""
    if not reaches(model.decoder.norm.weight) or model.backend.name == "reference":
        return
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.kernel, module.add_kernel = rms_norm, add_rms_norm
        elif isinstance(module, SwiGlu):
            module.kernel = swiglu
