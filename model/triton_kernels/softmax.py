"""What the attention kernels share: softmax over keys that come tile by tile, and which tile a program has.

Scores are in units of log 2, so that weights are powers of 2. A row's state is its largest score so far, and the sum
of weights and the weighted values, both relative to it. A row that has seen no key has -inf, 0 and zeros. Not a
number stays not a number: it spreads to the sum and the values, whatever the largest score is.
"""

from __future__ import annotations

from model.triton_kernels.language import jit, tl

LOG2_E = 1.4426950408889634
"""exp(x) = 2 ** (LOG2_E x)."""


@jit
def comparable(query, stored: tl.constexpr):
    """Queries in the precision in which they meet keys: float8 becomes float16 in one instruction."""
    if stored.primitive_bitwidth == 8 and query.dtype == tl.bfloat16:
        query = query.to(tl.float16)
    return query


@jit
def fresh_state(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Of rows that have seen no key: the largest score [M], the sum of weights [M], the weighted values [M, D]."""
    nothing = tl.zeros([ROWS], tl.float32)
    return nothing - float("inf"), nothing, tl.zeros([ROWS, HEAD_DIM], tl.float32)


@jit
def settled(numbers, stored: tl.constexpr, queried: tl.constexpr):
    """As they are; but what `comparable` makes of float8 is converted before it is moved. Left to itself, Triton
    brings bytes into a product's layout and converts them there: five times as many reads of shared memory."""
    if stored.primitive_bitwidth == 8 and queried == tl.bfloat16:
        numbers = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [numbers], dtype=tl.float16, is_pure=False, pack=2
        )
    return numbers


@jit
def absorb(products, scale, value, largest, total, weighted):
    """Take in a tile of keys and values. -> the new state.

    products: [M, N], of queries and keys, -inf where hidden; scale: above 0, from a product to a score;
    value: [N, D], zeros where there is none.
    """
    new_largest = tl.maximum(largest, tl.max(products, 1) * scale)
    reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(products * scale - reference[:, None])
    shrink = tl.exp2(largest - reference)
    total = total * shrink + tl.sum(weights, 1)
    weighted = tl.dot(weights.to(value.dtype), value, weighted * shrink[:, None], input_precision="ieee")
    return new_largest, total, weighted


@jit
def find_tile(starts, num_sequences, tile, ROWS: tl.constexpr, SCAN: tl.constexpr):
    """Which sequence a tile of ROWS rows belongs to, when each sequence begins a new tile.

    starts: int32 [num_sequences + 1], where each one's rows begin -> the sequence, and its tile counted from 0;
    the sequence is num_sequences for a tile past the last. Sequences are looked at SCAN at a time, without a table
    from the host.
    """
    sequence = 0
    passed_tiles = 0
    tiles = 0
    for first in range(0, num_sequences, SCAN):
        places = first + tl.arange(0, SCAN)
        inside = places < num_sequences
        begin = tl.load(starts + places, mask=inside, other=0)
        end = tl.load(starts + places + 1, mask=inside, other=0)
        ends = tiles + tl.cumsum((end - begin + ROWS - 1) // ROWS, 0)
        is_passed = inside & (ends <= tile)
        sequence += tl.sum(is_passed.to(tl.int32), 0)
        passed_tiles = tl.maximum(passed_tiles, tl.max(tl.where(is_passed, ends, 0), 0))
        tiles = tl.max(ends, 0)
    return sequence, tile - passed_tiles
