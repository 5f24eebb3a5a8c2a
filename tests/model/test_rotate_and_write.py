"""The fused rotary embedding and cache write against plain torch, over strides, widths, precisions and slots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.attention.reference import rotate
from model.triton_kernels.rotate_and_write import (
    rotate_and_write,
    rotate_and_write_plain,
    rotate_write_and_keep,
)

N, P = 5, 4
SLOTS = (7, -1, N * P - 1, P, -1, 9)
"""None in the null block, which no sequence has."""
SHAPES = [(4, 4, 16), (6, 2, 8), (3, 1, 24), (17, 17, 128)]
"""H, Hkv, D: one group of heads and several, widths that are no power of two."""
POISON = 96.0
"""In every slot before the step; exact in every precision."""


def precisions(device: torch.device) -> list[torch.dtype]:
    """The interpreter rounds to bfloat16 by cutting off, a GPU as torch does."""
    return [torch.float32, torch.float16, *([torch.bfloat16] if device.type == "cuda" else [])]


def make_step(
    shape: tuple[int, int, int], dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Heads that are a strided view, their angles, a cache full of poison, and slots."""
    num_heads, num_kv_heads, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    wide = torch.randn(len(SLOTS), 2, num_heads + 2 * num_kv_heads, width + 8, generator=generator)
    heads = wide.to(device, dtype)[:, 1, :, :width]
    cos, sin = torch.randn(2, len(SLOTS), 1, width // 2, generator=generator).to(device, dtype)
    cache = torch.full((2, N, P, num_kv_heads, width), POISON, device=device).to(cache_dtype)
    return heads, cos, sin, cache, torch.tensor(SLOTS, dtype=torch.int32, device=device)


def tolerance(dtype: torch.dtype) -> float:
    """A GPU may contract a product and a sum of float32 into one rounding; below it, every rounding is the same."""
    return 1e-6 if dtype == torch.float32 else 0.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_and_cache_equal_plain_torch(shape: tuple[int, int, int], kernel_device: torch.device) -> None:
    for dtype in precisions(kernel_device):
        for cache_dtype in {dtype, torch.float32}:
            heads, cos, sin, cache, slots = make_step(shape, dtype, cache_dtype, kernel_device)
            expected_cache = cache.clone()
            expected = rotate_and_write_plain(heads, cos, sin, expected_cache, slots)
            query = rotate_and_write(heads, cos, sin, cache, slots)
            exact = tolerance(dtype)
            torch.testing.assert_close(query, expected[0], atol=exact, rtol=exact)
            torch.testing.assert_close(cache, expected_cache, atol=exact, rtol=exact)


def test_the_steps_own_keys_and_values_come_back(kernel_device: torch.device) -> None:
    heads, cos, sin, cache, slots = make_step((6, 2, 8), torch.float16, torch.float16, kernel_device)
    kept = rotate_write_and_keep(heads, cos, sin, cache, slots)
    for ours, theirs in zip(kept, rotate(heads, cos, sin, 2), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(cache.flatten(1, 2)[1, slots[0]], kept[2][0])


def test_a_cache_of_another_layout_is_written_through_its_strides(kernel_device: torch.device) -> None:
    heads, cos, sin, cache, slots = make_step((4, 4, 16), torch.float16, torch.float16, kernel_device)
    by_head = cache.transpose(2, 3).contiguous().transpose(2, 3)
    assert by_head.stride() != cache.stride()
    rotate_and_write(heads, cos, sin, cache, slots)
    rotate_and_write(heads, cos, sin, by_head, slots)
    assert torch.equal(cache, by_head)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_e4m3_holds_the_value_over_its_heads_scale_and_saturates(head_dim: int, kernel_device: torch.device) -> None:
    """Values that e4m3 holds exactly: the interpreter rounds to it in a way of its own."""
    exact = torch.tensor([-448.0, -13.0, -1.75, 0.0, 0.5, 1.0, 22.0, 448.0])
    stored = exact[torch.arange(len(SLOTS) * 2 * head_dim) % 7].view(len(SLOTS), 2, head_dim)
    scales = torch.tensor([[0.25, 4.0], [0.03125, 2.0]])
    heads = torch.zeros(len(SLOTS), 6, head_dim)
    heads[:, 2:4], heads[:, 4:6] = stored * scales[0, :, None], stored.flip(0) * scales[1, :, None]
    heads[0, 2, 3], heads[0, 5, 1], heads[2, 5, 0] = 1e6, -1e6, float("-inf")
    heads = heads.to(kernel_device)
    scales = torch.cat((scales, scales), dim=1).to(kernel_device)[:, 2:]  # a rank's share of all heads
    cos = torch.ones(len(SLOTS), 1, head_dim // 2, device=kernel_device)
    cache = torch.full((2, N, P, 2, head_dim), POISON, device=kernel_device).to(torch.float8_e4m3fn)
    expected = cache.clone()
    slots = torch.tensor(SLOTS, dtype=torch.int32, device=kernel_device)
    rotate_and_write_plain(heads, cos, torch.zeros_like(cos), expected, slots, scales)
    rotate_and_write(heads, cos, torch.zeros_like(cos), cache, slots, scales)
    read = cache.float()
    assert torch.equal(read, expected.float())
    first = read.flatten(1, 2)[:, SLOTS[0]]
    assert first[0, 0, 3] == 448.0
    assert first[1, 1, 1] == -448.0
    assert read.flatten(1, 2)[1, SLOTS[2], 1, 0] == -448.0


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.float8_e4m3fn], ids=str)
def test_padding_rows_write_nothing_and_neighbours_keep_what_they_have(cache_dtype: torch.dtype) -> None:
    heads, cos, sin, cache, slots = make_step((6, 2, 8), torch.float32, cache_dtype, torch.device("cpu"))
    scales = torch.ones(2, 2) if cache_dtype.itemsize == 1 else None
    before = cache.float().clone()
    rotate_and_write_plain(heads, cos, sin, cache, slots, scales)
    changed = (cache.float() != before).flatten(1, 2).flatten(2).any(2)
    assert changed.nonzero()[:, 1].unique().tolist() == sorted(slot for slot in SLOTS if slot >= 0)


def test_what_is_not_a_number_stays_so_in_e4m3() -> None:
    heads, cos, sin, cache, slots = make_step((1, 1, 8), torch.float32, torch.float8_e4m3fn, torch.device("cpu"))
    heads[0] = float("nan")
    rotate_and_write_plain(heads, cos, sin, cache, slots, torch.ones(2, 1))
    assert cache.float().flatten(1, 2)[:, SLOTS[0]].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_e4m3_is_rounded_on_a_gpu_as_torch_rounds(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    heads, cos, sin, cache, slots = make_step((17, 17, 128), dtype, torch.float8_e4m3fn, device)
    heads[0, 20] = float("nan")
    expected = cache.clone()
    scales = torch.rand(2, 17, device=device) * 0.01 + 0.001
    rotate_and_write_plain(heads, cos, sin, expected, slots, scales)
    rotate_and_write(heads, cos, sin, cache, slots, scales)
    assert torch.equal(cache.float().nan_to_num(999.0), expected.float().nan_to_num(999.0))


@pytest.mark.gpu
def test_a_cache_beyond_two_to_the_31_elements_is_written_where_it_should_be() -> None:
    device = torch.device("cuda")
    heads, cos, sin, _, slots = make_step((17, 17, 128), torch.bfloat16, torch.bfloat16, device)
    num_blocks = (1 << 31) // (16 * 17 * 128) + 2
    cache = torch.zeros(2, num_blocks, 16, 17, 128, dtype=torch.bfloat16, device=device)
    slots[0], slots[2] = num_blocks * 16 - 1, num_blocks * 16 - 17
    rotate_and_write(heads, cos, sin, cache, slots)
    _, key, value = rotate(heads, cos, sin, 17)
    for row in (0, 2):
        written = cache[:, slots[row] // 16, slots[row] % 16]
        assert torch.equal(written, torch.stack((key[row], value[row])))


def test_no_tokens_launch_nothing(kernel_device: torch.device) -> None:
    heads, cos, sin, cache, slots = make_step((4, 4, 16), torch.float16, torch.float16, kernel_device)
    query = rotate_and_write(heads[:0], cos[:0], sin[:0], cache, slots[:0])
    assert query.shape == (0, 4, 16)
    assert (cache == POISON).all()
