"""The choice of a token from each row of logits, by temperature, top-k, top-p, min-p and the Gumbel trick.

Rows are told apart on the host by what they need: greedy rows take the best; rows with a top-k of at most
`MAX_PARTIAL` look at that many candidates; rows with a longer one sort the whole vocabulary; the rest need
neither, and with top-p only where the nucleus ends. On a GPU kernels find that and sample in one pass
(`model.triton_kernels.sampling`); nothing waits for the device. A CPU adds up the mass in bands of the logits and
sorts those in which the nucleus lies.

A nucleus is the shortest run of tokens, by falling logit and, where those are equal, by rising id, that has at
least a mass of top-p. Rounding aside, all ways find the same one: an answer does not depend on the way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.messages import SamplingParams
from engine.noise import gumbel
from engine.row_groups import RowGroup, RowGroups
from model.triton_kernels.language import reaches
from model.triton_kernels.sampling import best_tokens, sample_tokens

MAX_PARTIAL = 1024
"""Candidates beyond which a sort of the whole vocabulary is no dearer than a selection."""

MAX_SORTED = 4096
"""Tokens of a vocabulary that a CPU sorts as quickly as it looks for the end of the nucleus."""
BANDS_PER_NAT = 8
NUM_BANDS = 256
"""Of equal width below the best logit; the last one holds the rest."""
MARGIN = 1e-5
"""Mass that two ways of adding up may differ by."""


def choose(logits: Tensor, batch: RowGroups) -> tuple[Tensor, Tensor]:
    """logits: float32 [B, V] -> token of each row, int64 [B], and whether any of its logits is NaN, bool [B]."""
    on_gpu = reaches(logits)
    if on_gpu:
        token_ids, maxima, broken = best_tokens(logits)
    else:
        token_ids = logits.argmax(-1)
        broken = logits.gather(-1, token_ids[:, None])[:, 0].isnan()  # NaN counts as the largest
    if rows := batch.rows(_is_partial):
        count = min(max(row.sampling.top_k for row in rows.members), logits.shape[1])
        values, ids = _best_candidates(logits[rows.index], count)
        token_ids[rows.index] = _sample_candidates(values / rows.column("temperature"), ids, rows)
    if rows := batch.rows(_is_sorted):
        token_ids[rows.index] = _sample_sorted(logits[rows.index], rows)
    for wanted, top_p in ((_is_nucleus, True), (_is_plain, False)):
        if rows := batch.rows(wanted):
            if on_gpu:
                _sample_by_kernel(logits, rows, maxima, token_ids, top_p=top_p)
            else:
                sample = _sample_nucleus if top_p else _sample_all
                token_ids[rows.index] = sample(logits[rows.index], rows)
    return token_ids, broken


def is_greedy(params: SamplingParams) -> bool:
    """Whether the best token is taken."""
    return params.temperature == 0.0 or params.top_k == 1


def _is_partial(params: SamplingParams) -> bool:
    return not is_greedy(params) and 0 < params.top_k <= MAX_PARTIAL


def _is_sorted(params: SamplingParams) -> bool:
    return not is_greedy(params) and params.top_k > MAX_PARTIAL


def _is_nucleus(params: SamplingParams) -> bool:
    return not is_greedy(params) and params.top_k <= 0 and params.top_p < 1.0


def _is_plain(params: SamplingParams) -> bool:
    return not is_greedy(params) and params.top_k <= 0 and params.top_p >= 1.0


def _sample_by_kernel(logits: Tensor, rows: RowGroup, maxima: Tensor, token_ids: Tensor, *, top_p: bool) -> None:
    sample_tokens(
        logits,
        rows.index,
        rows.column("temperature"),
        rows.log_min_p,
        rows.column("top_p") if top_p else None,
        rows.seeds,
        rows.steps(),
        maxima,
        token_ids,
    )


def _sample_all(logits: Tensor, rows: RowGroup) -> Tensor:
    """Every token is a candidate. logits: [R, V] -> int64 [R]."""
    values = logits / rows.column("temperature")
    values.masked_fill_(values < values.amax(-1, keepdim=True) + rows.log_min_p, -math.inf)
    ids = torch.arange(values.shape[1], device=logits.device)[None]
    return (values + gumbel(rows.seeds, rows.steps(), ids)).argmax(-1)


def _sample_nucleus(logits: Tensor, rows: RowGroup) -> Tensor:
    """Rows with top-p and no top-k. logits: [R, V] -> int64 [R]."""
    if logits.shape[1] <= MAX_SORTED or logits.device.type != "cpu":  # elsewhere the host would have to wait
        return _sample_sorted(logits, rows)
    values = logits / rows.column("temperature")
    probabilities = values.softmax(-1)
    bands = ((values.amax(-1, keepdim=True) - values) * BANDS_PER_NAT).clamp_(0, NUM_BANDS - 1).nan_to_num_(0).long()
    mass = torch.zeros(len(rows.members), NUM_BANDS, dtype=torch.float64)
    mass.scatter_add_(1, bands, probabilities.double())
    last = (mass.cumsum(-1) < rows.column("top_p") + MARGIN).sum(-1, keepdim=True)
    token_ids = torch.empty(len(rows.members), dtype=torch.int64)
    for place, member in enumerate(rows.members):
        ids = (bands[place] <= last[place]).nonzero()[:, 0]
        candidates, order = values[place, ids].sort(descending=True, stable=True)
        ids = ids[order]
        row = RowGroup([place], [member], logits.device)
        token_ids[place] = _sample_candidates(candidates[None], ids[None], row, probabilities[place, ids][None])[0]
    return token_ids


def _sample_sorted(logits: Tensor, rows: RowGroup) -> Tensor:
    """All in order. logits: [R, V] -> int64 [R]."""
    values, ids = (logits / rows.column("temperature")).sort(dim=-1, descending=True, stable=True)
    return _sample_candidates(values, ids, rows)


def _best_candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """logits: float32 [R, V] -> the best first, of equals the lower ids, and their ids, int64: [R, count] each.

    Which of equals `topk` takes, and in which order, depends on the count, so on the batch. Where it matters nothing
    is equal: a key has a logit's bits, turned so that they rise with it, above those of its id, which fall.
    """
    last = logits.shape[1] - 1
    if logits.device.type == "cpu":  # which may look
        values, ids = logits.topk(min(count + 1, last + 1))
        if bool((values[:, 1:] < values[:, :-1]).all()):
            return values[:, :count], ids[:, :count]
    bits = (logits + 0.0).view(torch.int32)  # both zeros become one
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    keys |= last - torch.arange(last + 1, device=logits.device)
    ids = last - (keys.topk(count).values & 0xFFFFFFFF)
    return logits.gather(1, ids), ids


def _sample_candidates(values: Tensor, ids: Tensor, rows: RowGroup, probabilities: Tensor | None = None) -> Tensor:
    """Sample from the K best, given best first, by temperature. values, ids: [R, K] -> int64 [R].

    probabilities: [R, K], where they are not all that may be sampled.
    """
    rank = torch.arange(values.shape[1], device=values.device)[None]
    top_k = rows.column("top_k", torch.int64)
    values = values.masked_fill((rank >= top_k) & (top_k > 0), -math.inf)
    probabilities = values.softmax(-1) if probabilities is None else probabilities
    before = probabilities.cumsum(-1) - probabilities  # mass of the better ones; 0 for the best
    dropped = (before >= rows.column("top_p")) & (rank > 0)
    dropped |= probabilities < rows.column("min_p") * probabilities[:, :1]
    noise = gumbel(rows.seeds, rows.steps(), ids)
    best = (values.masked_fill(dropped, -math.inf) + noise).argmax(-1, keepdim=True)
    return ids.gather(1, best)[:, 0]
