"""Compiled layers against torch's, operator by operator."""

from __future__ import annotations

import pytest
import torch

from model.compiled import exp2
from model.fused_cpu import rms_norm, swiglu
from model.layers import RMSNorm, SwiGlu


def rows(num_rows: int, width: int, scale: float) -> torch.Tensor:
    return (torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows)) * scale).bfloat16()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 16), (7, 33), (8, 512), (41, 129)])
def test_rms_norm_rounds_as_the_reference_does(num_rows: int, width: int, scale: float) -> None:
    norm = RMSNorm(width, 1e-6).bfloat16().requires_grad_(False)
    norm.weight.copy_(rows(1, width, 1.0)[0])
    x = rows(num_rows, width, scale)
    ours, reference = rms_norm(x, norm.weight, norm.eps), norm(x)
    assert (ours == reference).float().mean() > 0.999, "a sum of squares in another order may tip a tie"
    torch.testing.assert_close(ours, reference, atol=0, rtol=2**-7)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 16), (7, 34), (41, 130)])
def test_swiglu_rounds_as_the_reference_does(num_rows: int, width: int, scale: float) -> None:
    x = rows(num_rows, width, scale)
    ours, reference = swiglu(x), SwiGlu()(x)
    assert ours.shape == (num_rows, width // 2)
    differs = (ours != reference) & (ours.abs() > 1e-30)  # e^88 and more is a number here, and infinite there
    assert differs.float().mean() < 0.01
    torch.testing.assert_close(ours, reference, atol=1e-30, rtol=2**-6)


def test_strided_rows_and_no_rows() -> None:
    x = rows(12, 32, 1.0).view(6, 2, 32)[:, 1]
    weight = torch.ones(32, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x.contiguous(), weight, 1e-6))
    assert torch.equal(swiglu(x), swiglu(x.contiguous()))
    assert rms_norm(x[:0], weight, 1e-6).shape == (0, 32)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_row_stays_broken_and_alone(poison: float) -> None:
    x = rows(3, 32, 1.0)
    x[1, 5] = poison
    weight = torch.ones(32, dtype=torch.bfloat16)
    for ours, reference in (
        (rms_norm(x, weight, 1e-6), RMSNorm(32, 1e-6).bfloat16()(x)),
        (swiglu(x), SwiGlu()(x)),
    ):
        assert torch.equal(ours.isfinite(), reference.isfinite())


def test_powers_of_two_over_the_whole_range() -> None:
    for x in torch.linspace(-140.0, 126.9, 2001).tolist():
        exact = 2.0 ** max(x, -126.0)
        assert abs(exp2(x) - exact) <= 1e-5 * exact
