"""Linear layers before and after they are packed for a CPU."""

from __future__ import annotations

import pytest
import torch

from model.cpu import can_pack
from model.linear import MAX_INT8_ROWS, Linear

SHAPES = [(1, 16, 8), (3, 64, 48), (200, 48, 130)]


def make(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = True, gelu: bool = False) -> Linear:
    torch.manual_seed(inputs + outputs)
    return Linear(inputs, outputs, bias, gelu=gelu).to(dtype).requires_grad_(False)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 0.03, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("dtype", list(filter(can_pack, [torch.float32, torch.bfloat16])), ids=str)
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
    for layer in (model[0], model[2]):
        layer.pack()
    torch.testing.assert_close(model(x), expected)
    assert {name for name, _ in model.named_parameters()} == {"0.bias", "1.weight", "1.bias", "2.bias"}


def test_tied_weights_stay_with_the_embedding() -> None:
    embedding = torch.nn.Embedding(8, 16).requires_grad_(False)
    layer = make(16, 8, torch.float32, bias=False)
    layer.weight = embedding.weight
    layer.pack()
    torch.testing.assert_close(layer(embedding(torch.tensor([3]))), embedding.weight[3:4] @ embedding.weight.T)


@pytest.mark.parametrize("dtype", list(filter(can_pack, [torch.float32, torch.bfloat16])), ids=str)
def test_int8_weights_are_within_half_a_step_and_the_same_for_few_rows_and_many(dtype: torch.dtype) -> None:
    layer = make(64, 48, dtype)
    with torch.no_grad():
        layer.weight[7] = 0.0  # an output without weights has no scale
    weight = layer.weight.detach().double()
    layer.pack(int8=True)
    few, many = torch.eye(64, dtype=dtype)[:MAX_INT8_ROWS], torch.eye(64, dtype=dtype)
    bias = layer.bias.double()
    step = weight.abs().amax(1) / 127
    rounding = 0.02 if dtype == torch.bfloat16 else 1e-6
    assert ((layer(many).double() - bias - weight.T).abs() <= 0.51 * step + rounding).all()
    torch.testing.assert_close(layer(few), layer(many)[:MAX_INT8_ROWS], **tolerance(dtype))
    assert not torch.equal((layer(many).double() - bias).float(), weight.T.float()), "nothing was rounded"


@pytest.mark.parametrize("follows", ["nothing", "gelu", "residual"])
def test_what_follows_an_int8_product_is_the_same(follows: str) -> None:
    layer = make(64, 48, torch.float32, gelu=follows == "gelu")
    layer.pack(int8=True)
    x = torch.randn(MAX_INT8_ROWS + 1, 64)
    residual = torch.randn(MAX_INT8_ROWS + 1, 48) if follows == "residual" else None
    one = layer(x[:1], None if residual is None else residual[:1])
    torch.testing.assert_close(one, layer(x, residual)[:1], atol=1e-5, rtol=1e-5)
