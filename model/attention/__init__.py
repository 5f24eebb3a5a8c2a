"""Attention backends behind one protocol (`base`), and the choice among them (`select`).

`reference` runs on any device in plain torch and is the oracle for the others.
"""

from model.attention.base import AttentionBackend, AttentionMetadata, EncoderMetadata
from model.attention.select import select_backend

__all__ = ["AttentionBackend", "AttentionMetadata", "EncoderMetadata", "select_backend"]
