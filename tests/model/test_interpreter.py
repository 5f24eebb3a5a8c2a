"""What the tests of kernels take for granted of Triton: a canary for pairs of triton and numpy that do not fit."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def sum_first(values, length, out, BLOCK: tl.constexpr):
    """out[0] = the sum of the first length[0] values, block by block."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tl.load(length), BLOCK):
        places = start + tl.arange(0, BLOCK)
        total += tl.load(values + places, mask=places < tl.load(length), other=0.0)
    tl.store(out, tl.sum(total, 0))


@triton.jit
def square(matrix, out, SIZE: tl.constexpr):
    """out = matrix @ matrix."""
    places = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None]
    values = tl.load(matrix + places)
    tl.store(out + places, tl.dot(values, values, input_precision="ieee"))


@pytest.mark.parametrize("length", [0, 1, 16, 37])
def test_a_loop_may_be_bounded_by_what_is_in_memory(length: int, kernel_device: torch.device) -> None:
    values = torch.full((40,), float("nan"), device=kernel_device)
    values[:length] = 1.0
    out = torch.full((1,), float("nan"), device=kernel_device)
    sum_first[(1,)](values, torch.tensor([length], dtype=torch.int32, device=kernel_device), out, 16)
    assert out.item() == length


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_of_matrices_are_exact_enough(dtype: torch.dtype, kernel_device: torch.device) -> None:
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(kernel_device, dtype)
    out = torch.empty(16, 16, device=kernel_device)
    square[(1,)](matrix, out, 16)
    torch.testing.assert_close(out.double(), matrix.double() @ matrix.double(), atol=1e-5, rtol=1e-5)
