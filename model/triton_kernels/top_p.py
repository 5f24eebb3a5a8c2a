"""Where top-p cuts each row, without a sort: sixteen-way search over the bits of the logits, eight passes.

A token is kept while the mass of those before it is below top-p; before it are those of a higher value, and those
of the same value and a lower id. So the last value that is kept is the smallest of which the values above have
less than that mass. Values are ordered as their bits are, once the sign is turned, and each pass finds four of
those bits: it sums the mass of every sixteenth of the range that is left, chunk by chunk, and the next pass adds
up the chunks and chooses. Nothing is sent to the host, and sums are made in one fixed order: no row depends on its
batch.

At the end a sixteenth is one value. How often it occurs in a chunk is its mass there over that of one token, which
gives a tie its rank without another pass.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from model.triton_kernels.language import constexpr, jit, jit_with, next_power_of_2, tl

CHUNK = 4096
"""Of a row, for one program."""
BLOCK = 512
"""At a time, beside the sums of the sixteen ranges: 16 bytes a thread."""
BITS = 4
NUM_PASSES = 32 // BITS
WAYS = 1 << BITS

_CHUNK, _BLOCK, _BITS, _WAYS = (constexpr(number) for number in (CHUNK, BLOCK, BITS, WAYS))


class Search(NamedTuple):
    """What the passes leave behind for the kernel that draws. R rows of S chunks."""

    masses: Tensor
    """float32 [passes, R, S, 16]: of each sixteenth of what was left before the pass."""
    places: Tensor
    """int64 [passes, R]: where the range begins that a pass divides."""
    above: Tensor
    """float32 [passes, R]: the mass above it."""
    targets: Tensor
    """float32 [R]: the mass to keep."""
    top_p: Tensor
    """float32 [R]"""


def search(logits: Tensor, rows: Tensor, temperatures: Tensor, top_p: Tensor, maxima: Tensor) -> Search:
    """logits: float32 [B, V], rows: int64 [R], temperatures, top_p: float32 [R], maxima of the logits: [B]."""
    num_rows, vocab_size = rows.shape[0], logits.shape[1]
    num_chunks = -(-vocab_size // CHUNK)
    found = Search(
        logits.new_empty(NUM_PASSES, num_rows, num_chunks, WAYS),
        rows.new_empty(NUM_PASSES, num_rows),
        logits.new_empty(NUM_PASSES, num_rows),
        logits.new_empty(num_rows),
        top_p,
    )
    for number in range(NUM_PASSES):
        _narrow[num_rows, num_chunks](
            logits, rows, temperatures, maxima, *found, logits.stride(0), vocab_size, num_rows, num_chunks, number,
            CHUNKS_PADDED=next_power_of_2(num_chunks), num_warps=4,
        )  # fmt: skip
    return found


@jit_with(do_not_specialize=["num_rows", "number"])
def _narrow(
    logits, rows, temperatures, maxima, masses, places, above, targets, top_p,
    stride_row, vocab_size, num_rows, num_chunks, number, CHUNKS_PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    place, mass_above, target = settle(
        masses, places, above, targets, top_p, row, num_rows, num_chunks, number, CHUNKS_PADDED
    )
    if chunk == 0:
        tl.store(places + number * num_rows + row, place)
        tl.store(above + number * num_rows + row, mass_above)
        tl.store(targets + row, target)
    source = tl.load(rows + row)
    temperature = tl.load(temperatures + row)
    best = tl.div_rn(tl.load(maxima + source), temperature)
    shift = 32 - _BITS * (number + 1)
    way = tl.arange(0, _WAYS)[:, None]
    total = tl.zeros([_WAYS, _BLOCK], tl.float32)
    for start in range(0, _CHUNK, _BLOCK):
        token = (chunk * _CHUNK + start + tl.arange(0, _BLOCK))[None, :]
        logit = tl.load(logits + source * stride_row + token, mask=token < vocab_size, other=float("-inf"))
        value = tl.div_rn(logit, temperature)
        inside = (ordered(value) - place) >> shift
        total += tl.where(inside == way, tl.exp(value - best), 0.0)
    target_row = masses + ((number * num_rows + row).to(tl.int64) * num_chunks + chunk) * _WAYS
    tl.store(target_row + tl.arange(0, _WAYS), tl.sum(total, 1))


@jit
def ordered(value):
    """float32 -> int64 from 0 to 2^32 in the same order; both zeros are one."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@jit
def settle(masses, places, above, targets, top_p, row, num_rows, num_chunks, number, CHUNKS_PADDED: tl.constexpr):
    """What is known of a row before a pass: where the range that is left begins, the mass above it, the target."""
    place = tl.zeros([], tl.int64)
    mass_above = tl.zeros([], tl.float32)
    target = tl.zeros([], tl.float32)
    if number > 0:
        before = (number - 1) * num_rows + row
        place = tl.load(places + before)
        mass_above = tl.load(above + before)
        chunk = tl.arange(0, CHUNKS_PADDED)[:, None]
        way = tl.arange(0, _WAYS)
        parts = masses + (before.to(tl.int64) * num_chunks + chunk) * _WAYS + way[None, :]
        mass = tl.sum(tl.load(parts, mask=chunk < num_chunks, other=0.0), 0)
        target = tl.load(targets + row)
        if number == 1:
            target = tl.maximum(tl.load(top_p + row) * tl.sum(mass, 0), 1e-30)
        higher = tl.sum(tl.where(way[None, :] > way[:, None], mass[None, :], 0.0), 1)
        chosen = tl.minimum(tl.sum((mass_above + higher >= target).to(tl.int32), 0), _WAYS - 1)
        mass_above += tl.sum(tl.where(way == chosen, higher, 0.0), 0)
        place += chosen.to(tl.int64) << (32 - _BITS * number)
    return place, mass_above, target
