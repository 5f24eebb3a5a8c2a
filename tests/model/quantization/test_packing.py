"""Unpacking against packers that know nothing of it, and against words written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.quantization.packing import AWQ_PLACES, unpack, unpack_awq, unpack_gptq
from model.quantization.scheme import QuantizationScheme
from tests.model.quantization.checkpoints import (
    AWQ_ORDER,
    awq,
    gptq,
    pack_along_columns,
    pack_along_rows,
)


def test_words_by_hand() -> None:
    word = torch.tensor([[0x76543210], [-0x01234568]], dtype=torch.int32)  # the second is 0xFEDCBA98
    assert unpack(word, 4).tolist() == [list(range(8)), list(range(8, 16))]
    assert unpack(word, 8).tolist() == [[0x10, 0x32, 0x54, 0x76], [0x98, 0xBA, 0xDC, 0xFE]]
    assert unpack(word, 4, AWQ_PLACES).tolist()[0] == [0, 4, 1, 5, 2, 6, 3, 7]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_what_is_packed_comes_back(bits: int, rows: int, words: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, words * 32 // bits))
    assert np.array_equal(unpack(pack_along_columns(codes, bits), bits).numpy(), codes)
    assert np.array_equal(unpack(pack_along_rows(codes.T, bits).T.contiguous(), bits).numpy(), codes)
    if bits == 4:
        assert np.array_equal(unpack(pack_along_columns(codes, 4, AWQ_ORDER), 4, AWQ_PLACES).numpy(), codes)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([16, 32, 64]), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_awq_weights_are_what_their_numbers_mean(group_size: int, groups: int, words: int, seed: int) -> None:
    weight = torch.randn(8 * words, groups * group_size, generator=torch.Generator().manual_seed(seed))
    parts, expected = awq(weight, group_size)
    assert torch.equal(unpack_awq(QuantizationScheme("awq", 4, group_size), **parts).dense(), expected)
    assert (expected - weight).abs().max() < 0.6 * float(parts["scales"].max()), "within a step of what it was"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([4, 8]), st.sampled_from([-1, 16, 32]), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1)
)
def test_gptq_weights_are_what_their_numbers_mean(
    bits: int, group_size: int, v2: bool, act_order: bool, seed: int
) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    parts, expected = gptq(weight, group_size, bits=bits, v2=v2, act_order=act_order)
    scheme = QuantizationScheme("gptq", bits, group_size, 0 if v2 else 1)
    assert torch.equal(unpack_gptq(scheme, **parts).dense(), expected)
    if not act_order:
        del parts["g_idx"]
        assert torch.equal(unpack_gptq(scheme, **parts).dense(), expected), "groups follow each other without g_idx"
    other = QuantizationScheme("gptq", bits, group_size, 1 if v2 else 0)
    assert not torch.equal(unpack_gptq(other, **parts).dense(), expected)


def test_a_zero_point_of_zero_survives_gptqs_first_format() -> None:
    scheme = QuantizationScheme("gptq", 4, -1, 1)
    stored = torch.full((1, 1), -1, dtype=torch.int32)  # 0 - 1 in each of 8 places
    weight = unpack_gptq(scheme, torch.full((1, 8), 0x11111111, dtype=torch.int32), stored, torch.ones(1, 8))
    assert weight.dense().unique().tolist() == [1.0]


@pytest.mark.parametrize("broken", ["scales", "qzeros", "g_idx", "group"])
def test_shapes_that_do_not_fit_are_refused(broken: str) -> None:
    parts, _ = gptq(torch.randn(16, 64), 32, bits=4, v2=True, act_order=False)
    if broken == "group":
        parts["g_idx"][3] = 2
    else:
        parts[broken] = parts[broken][:-1]
    with pytest.raises(ValueError, match=r"group|integers"):
        unpack_gptq(QuantizationScheme("gptq", 4, 32), **parts)
