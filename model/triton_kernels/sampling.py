"""The choice of tokens in as few passes over the logits as it takes: one for the best, one more for a sample.

`best_tokens` reads each row once: its best token, that one's logit, and whether anything in it is not a number.
`sample_tokens` reads it once more: temperature, min-p, the cut of top-p (`top_p.search`), noise made where it is
needed, and the argmax. In torch that noise alone was some twenty tensors of 64-bit numbers. A program takes a
chunk of a row; a second, small launch finds the best chunk. Of equals the lowest id wins, as in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.triton_kernels.language import constexpr, jit, jit_with, next_power_of_2, reaches, tl
from model.triton_kernels.noise import gumbel, stream_of
from model.triton_kernels.top_p import BITS, CHUNK, NUM_PASSES, WAYS, Search, ordered, search, settle

BLOCK = 1024

_CHUNK, _BLOCK, _BITS, _WAYS, _NUM_PASSES = (constexpr(n) for n in (CHUNK, BLOCK, BITS, WAYS, NUM_PASSES))


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits: float32 [B, V] -> the best token, int64 [B], its logit, [B], and whether any is NaN, bool [B].

    NaN counts as -inf.
    """
    num_rows, vocab_size = logits.shape
    num_chunks = -(-vocab_size // CHUNK)
    best = logits.new_empty(num_rows, num_chunks)
    ids = logits.new_empty(num_rows, num_chunks, dtype=torch.int32)
    is_nan = logits.new_empty(num_rows, num_chunks, dtype=torch.int32)
    _best_of_chunks[num_rows, num_chunks](logits, best, ids, is_nan, logits.stride(0), vocab_size, num_chunks)
    token_ids = logits.new_empty(num_rows, dtype=torch.int64)
    maxima = logits.new_empty(num_rows)
    broken = logits.new_empty(num_rows, dtype=torch.bool)
    _best_of_rows[(num_rows,)](
        best, ids, is_nan, token_ids, token_ids, maxima, broken, num_chunks,
        CHUNKS_PADDED=next_power_of_2(num_chunks), IS_SCATTERED=False,
    )  # fmt: skip
    return token_ids, maxima, broken


def sample_tokens(
    logits: Tensor,
    rows: Tensor,
    temperatures: Tensor,
    log_min_p: Tensor,
    top_p: Tensor | None,
    seeds: Tensor,
    steps: Tensor,
    maxima: Tensor,
    token_ids: Tensor,
) -> None:
    """Overwrite the tokens of some rows by samples. logits: float32 [B, V]; maxima of it, token_ids: [B].

    rows, seeds, steps: int64 [R]; temperatures, log_min_p, top_p: float32 [R], top_p None where all is kept.
    """
    num_rows, vocab_size = rows.shape[0], logits.shape[1]
    num_chunks = -(-vocab_size // CHUNK)
    best = logits.new_empty(num_rows, num_chunks)
    ids = logits.new_empty(num_rows, num_chunks, dtype=torch.int32)
    nothing = Search(logits, rows, logits, logits, logits)
    found = nothing if top_p is None else search(logits, rows, temperatures, top_p, maxima)
    padded = next_power_of_2(num_chunks)
    _draw_of_chunks[num_rows, num_chunks](
        logits, rows, temperatures, log_min_p, seeds, steps, maxima, *found, best, ids,
        logits.stride(0), vocab_size, num_rows, num_chunks, CHUNKS_PADDED=padded, HAS_TOP_P=top_p is not None,
    )  # fmt: skip
    _best_of_rows[(num_rows,)](
        best, ids, ids, rows, token_ids, best, best, num_chunks, CHUNKS_PADDED=padded, IS_SCATTERED=True
    )


def compile_kernels(vocab_size: int, device: torch.device) -> None:
    """Run each kernel once, if they can: the first request with a new parameter would wait for its compilation."""
    logits = torch.zeros(1, vocab_size, device=device)
    if not reaches(logits):
        return
    token_ids, maxima, _ = best_tokens(logits)
    ones = torch.ones(1, device=device)
    zeros = torch.zeros(1, dtype=torch.int64, device=device)
    for top_p in (None, ones):
        sample_tokens(logits, zeros, ones, ones, top_p, zeros, zeros, maxima, token_ids)


@jit
def _best_of_chunks(logits, best, ids, is_nan, stride_row, vocab_size, num_chunks):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    lane = tl.arange(0, _BLOCK)
    value = tl.full([_BLOCK], float("-inf"), tl.float32)
    found = chunk * _CHUNK + lane
    broken = tl.zeros([_BLOCK], tl.int32)
    for start in range(0, _CHUNK, _BLOCK):
        token = chunk * _CHUNK + start + lane
        logit = tl.load(logits + row * stride_row + token, mask=token < vocab_size, other=float("-inf"))
        broken |= (logit != logit).to(tl.int32)
        found = tl.where(logit > value, token, found)  # false of NaN
        value = tl.where(logit > value, logit, value)
    _store_best(best, ids, row * num_chunks + chunk, value, found)
    tl.store(is_nan + row * num_chunks + chunk, tl.max(broken, 0))


@jit_with(do_not_specialize=["num_rows"])
def _draw_of_chunks(
    logits, rows, temperatures, log_min_p, seeds, steps, maxima, masses, places, above, targets, top_p, best, ids,
    stride_row, vocab_size, num_rows, num_chunks, CHUNKS_PADDED: tl.constexpr, HAS_TOP_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    source = tl.load(rows + row)
    temperature = tl.load(temperatures + row)
    maximum = tl.div_rn(tl.load(maxima + source), temperature)
    least = maximum + tl.load(log_min_p + row)
    stream = stream_of(tl.load(seeds + row), tl.load(steps + row))
    if HAS_TOP_P:
        cut, mass_above, target = settle(
            masses, places, above, targets, top_p, row, num_rows, num_chunks, _NUM_PASSES, CHUNKS_PADDED
        )
        weight, rank = _ties(masses, places, cut, maximum, row, chunk, num_rows, num_chunks, CHUNKS_PADDED)
    lane = tl.arange(0, _BLOCK)
    value = tl.full([_BLOCK], float("-inf"), tl.float32)
    found = chunk * _CHUNK + lane
    for start in range(0, _CHUNK, _BLOCK):
        token = chunk * _CHUNK + start + lane
        logit = tl.load(logits + source * stride_row + token, mask=token < vocab_size, other=float("-inf"))
        scaled = tl.div_rn(logit, temperature)
        kept = scaled >= least
        if HAS_TOP_P:
            key = ordered(scaled)
            is_tie = (key == cut).to(tl.int32)
            order = rank + tl.cumsum(is_tie, 0) - is_tie
            rank += tl.sum(is_tie, 0)
            kept &= (key > cut) | ((key == cut) & (mass_above + order.to(tl.float32) * weight < target))
        scaled = tl.where(kept, scaled + gumbel(stream, token), float("-inf"))
        found = tl.where(scaled > value, token, found)
        value = tl.where(scaled > value, scaled, value)
    _store_best(best, ids, row.to(tl.int64) * num_chunks + chunk, value, found)


@jit
def _ties(masses, places, cut, maximum, row, chunk, num_rows, num_chunks, CHUNKS_PADDED: tl.constexpr):
    """-> the mass of one token of the last value kept, and how many of them stand in the chunks before this one."""
    bits = (cut - 2147483648).to(tl.int32)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    weight = tl.exp(value - maximum)
    last = (_NUM_PASSES - 1) * num_rows + row
    way = (cut - tl.load(places + last)).to(tl.int32)
    before = tl.arange(0, CHUNKS_PADDED)
    parts = masses + (last.to(tl.int64) * num_chunks + before) * _WAYS + way
    mass = tl.load(parts, mask=before < chunk, other=0.0)
    counts = tl.where(weight > 0.0, mass / weight + 0.5, 0.0).to(tl.int32)
    return weight, tl.sum(counts, 0)


@jit
def _store_best(best, ids, place, value, found):
    maximum = tl.max(value, 0)
    tl.store(best + place, maximum)
    tl.store(ids + place, tl.min(tl.where(value == maximum, found, 2147483647), 0))


@jit
def _best_of_rows(
    best, ids, is_nan, rows, token_ids, maxima, broken, num_chunks,
    CHUNKS_PADDED: tl.constexpr, IS_SCATTERED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS_PADDED)
    inside = chunk < num_chunks
    value = tl.load(best + row * num_chunks + chunk, mask=inside, other=float("-inf"))
    token = tl.load(ids + row * num_chunks + chunk, mask=inside, other=2147483647)
    maximum = tl.max(value, 0)
    token_id = tl.min(tl.where(value == maximum, token, 2147483647), 0).to(tl.int64)
    if IS_SCATTERED:
        tl.store(token_ids + tl.load(rows + row), token_id)
    else:
        tl.store(token_ids + row, token_id)
        tl.store(maxima + row, maximum)
        flags = tl.load(is_nan + row * num_chunks + chunk, mask=inside, other=0)
        tl.store(broken + row, tl.max(flags, 0) > 0)
