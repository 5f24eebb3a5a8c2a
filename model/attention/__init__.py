"""Attention backends behind one protocol (`base`), and the choice among them (`select`).

`reference` runs on any device in plain torch and is the oracle for the others; `cpu` is for CPUs; `triton`, the two
versions of FlashAttention and the one built into torch are for CUDA.
"""

from model.attention.base import AttentionBackend, AttentionMetadata, EncoderMetadata
from model.attention.select import select_backend

__all__ = ["AttentionBackend", "AttentionMetadata", "EncoderMetadata", "select_backend"]
