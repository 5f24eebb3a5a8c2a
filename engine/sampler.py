"""Logits -> tokens. All rows stay on the device until one copy at the end; parameters are known on the host.

Order of operations, as in transformers: logit bias and stop-token mask, repetition penalty, presence and frequency
penalties, a grammar's mask, temperature, top-k, top-p, min-p, then a sample by the Gumbel trick. Logprobs are of the
raw logits.

Rows are told apart on the host by what they need: greedy rows take an argmax; rows with a top-k of at most
`MAX_PARTIAL` look at that many candidates; rows that need the order of the whole vocabulary (top-p alone) sort it;
the rest add noise to every logit and take the argmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from engine.answer import SampledToken
from engine.guidance import TokenMasks
from engine.messages import SamplingParams, SequenceId, TokenLogprobs
from engine.noise import gumbel
from engine.penalties import PenaltyTable
from engine.sample_row import SampleRow
from engine.verification import verify

MAX_PARTIAL = 1024
"""Candidates beyond which a sort of the whole vocabulary is no dearer than a selection."""

NOT_A_NUMBER = "the model's output for this request is not a number"


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a batch that are sampled alike."""

    index: Tensor
    """int64 [R]"""
    members: list[SampleRow]

    def column(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A parameter of each row. -> [R, 1]."""
        values = [getattr(row.sampling, name) for row in self.members]
        return torch.tensor(values, dtype=dtype, device=self.index.device)[:, None]


class Sampler:
    """Holds the penalty table; everything else is an argument."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.penalties = PenaltyTable(max_num_seqs, vocab_size, device)

    def sample(
        self, logits: Tensor, batch: list[SampleRow], masks: TokenMasks | None = None
    ) -> dict[SequenceId, tuple[SampledToken, ...]]:
        """A token for each row that stands (see verification). logits: float32 [B, V], overwritten."""
        broken = logits.isnan().any(-1)
        raw = _raw_logprobs(logits, batch)
        _apply_bias(logits, batch)
        penalised = _rows(logits, batch, _has_penalty)
        if penalised:
            table_rows = self.penalties.rows([row.sequence for row in penalised.members])
            self._apply_penalties(logits, penalised, table_rows)
        if masks:
            _apply_masks(logits, masks)
        token_ids = _choose(logits, batch)
        stands = verify(token_ids, batch)
        if penalised:
            self.penalties.count(table_rows, token_ids[penalised.index], stands[penalised.index])
        return _collect(batch, token_ids, stands, broken, raw)

    def _apply_penalties(self, logits: Tensor, rows: _Rows, table_rows: Tensor) -> None:
        chosen = logits[rows.index]
        repetition = rows.column("repetition_penalty")
        scaled = torch.where(chosen < 0, chosen * repetition, chosen / repetition)
        counts = self.penalties.output_counts(table_rows, [row.draft_token_ids for row in rows.members])
        chosen = torch.where(self.penalties.in_prompt(table_rows) | (counts > 0), scaled, chosen)
        chosen -= rows.column("frequency_penalty") * counts + rows.column("presence_penalty") * (counts > 0)
        logits[rows.index] = chosen


def _rows(logits: Tensor, batch: list[SampleRow], wanted: Callable[[SamplingParams], bool]) -> _Rows | None:
    """Rows whose sampling parameters satisfy `wanted`, if any."""
    index = [row for row, sampled in enumerate(batch) if wanted(sampled.sampling)]
    if not index:
        return None
    return _Rows(torch.tensor(index, device=logits.device), [batch[row] for row in index])


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature == 0.0 or params.top_k == 1


def _is_partial(params: SamplingParams) -> bool:
    return not _is_greedy(params) and 0 < params.top_k <= MAX_PARTIAL


def _is_sorted(params: SamplingParams) -> bool:
    return not _is_greedy(params) and not _is_partial(params) and (params.top_k > 0 or params.top_p < 1.0)


def _is_plain(params: SamplingParams) -> bool:
    return not (_is_greedy(params) or _is_partial(params) or _is_sorted(params))


def _apply_bias(logits: Tensor, batch: list[SampleRow]) -> None:
    """Add logit biases, and mask stop tokens of answers that are still too short."""
    for row, sampled in enumerate(batch):
        params = sampled.sampling
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            logits[row, list(ids)] += torch.tensor(values, device=logits.device)
        if sampled.num_output_tokens < params.min_tokens and params.stop_token_ids:
            logits[row, list(params.stop_token_ids)] = -math.inf


def _apply_masks(logits: Tensor, masks: TokenMasks) -> None:
    """Leave the rows of grammars only what these allow."""
    device = logits.device
    packed = torch.from_numpy(masks.allowed).to(device, non_blocking=True)
    barred = _barred_bits(device)[packed.long()].view(torch.bool)[:, : logits.shape[1]]
    if len(masks.rows) < logits.shape[0]:  # filling bools is cheaper than gathering logits
        rows = torch.tensor(masks.rows, device=device)
        barred = torch.zeros_like(logits, dtype=torch.bool).index_copy_(0, rows, barred)
    logits.masked_fill_(barred, -math.inf)
    for row, token_id in masks.forced:
        logits[row, token_id] = 0.0


@cache
def _barred_bits(device: torch.device) -> Tensor:
    """Eight bools, as one integer, for each byte of a mask: the bits that are not set. -> int64 [256]."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(1 - bits).view(torch.int64)[:, 0].to(device)


def _choose(logits: Tensor, batch: list[SampleRow]) -> Tensor:
    """logits: [B, V] -> int64 [B]."""
    token_ids = logits.argmax(-1)
    if rows := _rows(logits, batch, _is_partial):
        count = min(max(row.sampling.top_k for row in rows.members), logits.shape[1])
        values, ids = logits[rows.index].topk(count)
        token_ids[rows.index] = _sample_candidates(values, ids, rows)
    if rows := _rows(logits, batch, _is_sorted):
        values, ids = logits[rows.index].sort(descending=True)
        token_ids[rows.index] = _sample_candidates(values, ids, rows)
    if rows := _rows(logits, batch, _is_plain):
        values = logits[rows.index] / rows.column("temperature")
        values.masked_fill_(values < values.amax(-1, keepdim=True) + rows.column("min_p").log(), -math.inf)
        ids = torch.arange(values.shape[1], device=logits.device)[None]
        token_ids[rows.index] = (values + _noise(rows, ids)).argmax(-1)
    return token_ids


def _sample_candidates(values: Tensor, ids: Tensor, rows: _Rows) -> Tensor:
    """Sample from the K best, given best first. values, ids: [R, K] -> int64 [R]."""
    values = values / rows.column("temperature")
    rank = torch.arange(values.shape[1], device=values.device)[None]
    top_k = rows.column("top_k", torch.int64)
    values = values.masked_fill((rank >= top_k) & (top_k > 0), -math.inf)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the better ones; 0 for the best
    dropped = (before >= rows.column("top_p")) & (rank > 0)
    dropped |= probabilities < rows.column("min_p") * probabilities[:, :1]
    best = (values.masked_fill(dropped, -math.inf) + _noise(rows, ids)).argmax(-1, keepdim=True)
    return ids.gather(1, best)[:, 0]


def _noise(rows: _Rows, ids: Tensor) -> Tensor:
    device = ids.device
    seeds = torch.tensor([row.seed for row in rows.members], device=device)
    steps = torch.tensor([row.num_output_tokens for row in rows.members], device=device)
    return gumbel(seeds, steps, ids)


def _raw_logprobs(logits: Tensor, batch: list[SampleRow]) -> dict[int, Tensor]:
    """Log-softmax of the rows that ask for logprobs, before anything is done to them."""
    rows = _rows(logits, batch, lambda params: params.logprobs is not None)
    if rows is None:
        return {}
    return dict(zip(rows.index.tolist(), logits[rows.index].log_softmax(-1), strict=True))


def _collect(
    batch: list[SampleRow], token_ids: Tensor, stands: Tensor, broken: Tensor, raw: dict[int, Tensor]
) -> dict[SequenceId, tuple[SampledToken, ...]]:
    """Copy to the host."""
    ids, does_stand, is_broken = torch.stack((token_ids, stands.long(), broken.long())).tolist()
    sampled: dict[SequenceId, tuple[SampledToken, ...]] = {}
    for row, sample in enumerate(batch):
        if not does_stand[row]:
            continue
        logprobs = _token_logprobs(raw[row], ids[row], sample.sampling.logprobs or 0) if row in raw else None
        token = SampledToken(ids[row], logprobs, NOT_A_NUMBER if is_broken[row] else None)
        sampled[sample.sequence_id] = (*sampled.get(sample.sequence_id, ()), token)
    return sampled


def _token_logprobs(logprobs: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """logprobs: [V]."""
    values, ids = logprobs.topk(num_top)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs[token_id]), top)
