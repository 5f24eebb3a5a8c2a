"""Fused kernels in Triton, one module for each, beside the plain torch that each of them equals.

Every module can be imported without Triton, and runs its plain form on tensors that Triton cannot reach.
"""
