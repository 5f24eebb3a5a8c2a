"""Weights of fewer bits than are computed with: what checkpoints say of theirs (`scheme`), how they store them
(`packing`, `stored`), and products with them (`fp8_linear`)."""
