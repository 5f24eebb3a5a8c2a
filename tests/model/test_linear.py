"""Linear layers before and after they are packed for a CPU."""

from __future__ import annotations

import pytest
import torch

from model.linear import Linear, pack_linears

SHAPES = [(1, 16, 8), (3, 64, 48), (200, 48, 130)]


def make(in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool = True, gelu: bool = False) -> Linear:
    torch.manual_seed(in_features + out_features)
    return Linear(in_features, out_features, bias, gelu=gelu).to(dtype).requires_grad_(False)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 0.03, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("follows", ["nothing", "gelu", "residual"])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SHAPES)
def test_packing_changes_the_layout_and_not_the_product(
    rows: int, in_features: int, out_features: int, follows: str, bias: bool, dtype: torch.dtype
) -> None:
    layer = make(in_features, out_features, dtype, bias=bias, gelu=follows == "gelu")
    x = torch.randn(rows, in_features).to(dtype)
    residual = torch.randn(rows, out_features).to(dtype) if follows == "residual" else None
    expected = layer.double()(x.double(), None if residual is None else residual.double())
    layer = make(in_features, out_features, dtype, bias=bias, gelu=follows == "gelu")
    unpacked = layer(x, residual)
    layer.pack()
    packed = layer(x, residual)
    assert packed.dtype == dtype
    torch.testing.assert_close(unpacked.double(), expected, **tolerance(dtype))
    torch.testing.assert_close(packed.double(), expected, **tolerance(dtype))


def test_a_packed_layer_takes_strided_rows_and_none_at_all() -> None:
    layer = make(16, 8, torch.float32)
    x = torch.randn(6, 2, 16)
    expected = layer(x[:, 1])
    layer.pack()
    torch.testing.assert_close(layer(x[:, 1]), expected)
    assert layer(x[:0, 1]).shape == (0, 8)


def test_packing_lets_go_of_the_weights_as_loaded() -> None:
    model = torch.nn.Sequential(make(16, 8, torch.float32), torch.nn.LayerNorm(8), make(8, 4, torch.float32))
    x = torch.randn(3, 16)
    expected = model(x)
    pack_linears(model)
    torch.testing.assert_close(model(x), expected)
    assert {name for name, _ in model.named_parameters()} == {"0.bias", "1.weight", "1.bias", "2.bias"}


def test_tied_weights_stay_with_the_embedding() -> None:
    embedding = torch.nn.Embedding(8, 16).requires_grad_(False)
    layer = make(16, 8, torch.float32, bias=False)
    layer.weight = embedding.weight
    layer.pack()
    torch.testing.assert_close(layer(embedding(torch.tensor([3]))), embedding.weight[3:4] @ embedding.weight.T)
