"""Logits -> tokens. Nothing here waits for the device: parameters go there, and `SampledBatch` brings tokens back.

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
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from engine.answer import SampledToken
from engine.device import HostCopy, to_device
from engine.guidance import TokenMasks
from engine.messages import SamplingParams, SequenceId, TokenLogprobs
from engine.noise import gumbel
from engine.penalties import PenaltyTable
from engine.sample_row import SampleRow
from engine.verification import verify

MAX_PARTIAL = 1024
"""Candidates beyond which a sort of the whole vocabulary is no dearer than a selection."""

NOT_A_NUMBER = "the model's output for this request is not a number"


class _Rows:
    """Rows of a batch that are sampled alike, and their parameters on the device."""

    def __init__(self, index: list[int], members: list[SampleRow], device: torch.device) -> None:
        self.index = to_device(index, device)
        """int64 [R]"""
        self.members = members
        self._columns: dict[str, Tensor] = {}

    def column(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A parameter of each row. -> [R, 1]."""
        if name not in self._columns:
            values = [getattr(row.sampling, name) for row in self.members]
            self._columns[name] = to_device(values, self.index.device, dtype)[:, None]
        return self._columns[name]

    @cached_property
    def seeds(self) -> Tensor:
        """int64 [R]"""
        return to_device([row.seed for row in self.members], self.index.device)


class _Batch:
    """Rows that are sampled together. While the same sequences decode it is kept, and nothing is looked up again."""

    def __init__(self, members: list[SampleRow], device: torch.device) -> None:
        self.members = members
        self._device = device
        self._rows: dict[Callable[[SamplingParams], bool], _Rows | None] = {}

    def rows(self, wanted: Callable[[SamplingParams], bool]) -> _Rows | None:
        """Rows whose sampling parameters satisfy `wanted`, if any."""
        if wanted not in self._rows:
            index = [place for place, row in enumerate(self.members) if wanted(row.sampling)]
            members = [self.members[place] for place in index]
            self._rows[wanted] = _Rows(index, members, self._device) if index else None
        return self._rows[wanted]


class SampledBatch:
    """What was sampled for a batch: on the device at once, on the host when `result` is asked for."""

    def __init__(
        self,
        members: list[SampleRow],
        token_ids: Tensor,
        stands: Tensor,
        broken: Tensor,
        logprobs: tuple[Tensor, ...] = (),
    ) -> None:
        """token_ids: int64 [B]; stands, broken: bool [B]; logprobs: those of `_logprobs`."""
        self.token_ids = token_ids
        self._members = members
        self._copy = HostCopy(torch.stack((token_ids, stands.long(), broken.long())), *logprobs)

    @cached_property
    def row_of(self) -> dict[SequenceId, int]:
        """Row of each sequence; only for a batch without drafts."""
        return {row.sequence_id: place for place, row in enumerate(self._members)}

    def result(self) -> dict[SequenceId, tuple[SampledToken, ...]]:
        """The tokens of each sequence that stand, at least one. Waits for the device."""
        tokens, *logprobs = (tensor.tolist() for tensor in self._copy.wait())
        rows_of_logprobs = zip(*logprobs, strict=True)
        sampled: dict[SequenceId, tuple[SampledToken, ...]] = {}
        for row, token_id, stands, is_broken in zip(self._members, *tokens, strict=True):
            count = row.sampling.logprobs
            told = None if count is None else _token_logprobs(token_id, count, *next(rows_of_logprobs))
            if stands:
                token = SampledToken(token_id, told, NOT_A_NUMBER if is_broken else None)
                sampled[row.sequence_id] = (*sampled.get(row.sequence_id, ()), token)
        return sampled


class Sampler:
    """Holds the penalty table, and the last batch's parameters; everything else is an argument."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.penalties = PenaltyTable(max_num_seqs, vocab_size, device)
        self._batch = _Batch([], device)
        """The last one."""

    def sample(self, logits: Tensor, members: list[SampleRow], masks: TokenMasks | None = None) -> SampledBatch:
        """A token for each row, and whether it stands (see verification). logits: float32 [B, V], overwritten."""
        if self._batch.members != members:
            self._batch = _Batch(members, logits.device)
        batch = self._batch
        broken = logits.isnan().any(-1)
        asking = batch.rows(_wants_logprobs)
        raw = logits[asking.index].log_softmax(-1) if asking else None
        _apply_bias(logits, batch)
        penalised = batch.rows(_has_penalty)
        if penalised:
            table_rows = self.penalties.rows([row.sequence for row in penalised.members])
            self._apply_penalties(logits, penalised, table_rows)
        if masks:
            _apply_masks(logits, masks)
        token_ids = _choose(logits, batch)
        stands = verify(token_ids, members)
        if penalised:
            self.penalties.count(table_rows, token_ids[penalised.index], stands[penalised.index])
        logprobs = _logprobs(raw, token_ids, asking) if asking and raw is not None else ()
        return SampledBatch(members, token_ids, stands, broken, logprobs)

    def _apply_penalties(self, logits: Tensor, rows: _Rows, table_rows: Tensor) -> None:
        chosen = logits[rows.index]
        repetition = rows.column("repetition_penalty")
        scaled = torch.where(chosen < 0, chosen * repetition, chosen / repetition)
        counts = self.penalties.output_counts(table_rows, [row.draft_token_ids for row in rows.members])
        chosen = torch.where(self.penalties.in_prompt(table_rows) | (counts > 0), scaled, chosen)
        chosen -= rows.column("frequency_penalty") * counts + rows.column("presence_penalty") * (counts > 0)
        logits[rows.index] = chosen


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _has_bias(params: SamplingParams) -> bool:
    return bool(params.logit_bias) or (params.min_tokens > 0 and bool(params.stop_token_ids))


def _wants_logprobs(params: SamplingParams) -> bool:
    return params.logprobs is not None


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature == 0.0 or params.top_k == 1


def _is_partial(params: SamplingParams) -> bool:
    return not _is_greedy(params) and 0 < params.top_k <= MAX_PARTIAL


def _is_sorted(params: SamplingParams) -> bool:
    return not _is_greedy(params) and not _is_partial(params) and (params.top_k > 0 or params.top_p < 1.0)


def _is_plain(params: SamplingParams) -> bool:
    return not (_is_greedy(params) or _is_partial(params) or _is_sorted(params))


def _apply_bias(logits: Tensor, batch: _Batch) -> None:
    """Add logit biases, and mask stop tokens of answers that are still too short."""
    if not batch.rows(_has_bias):
        return
    biases, barred = [], []
    for place, row in enumerate(batch.members):
        params = row.sampling
        biases += [(place, token_id, bias) for token_id, bias in params.logit_bias]
        if row.num_output_tokens < params.min_tokens:
            barred += [(place, token_id) for token_id in params.stop_token_ids]
    if biases:
        rows, ids, values = zip(*biases, strict=True)
        index = to_device((rows, ids), logits.device)
        logits.index_put_((index[0], index[1]), to_device(values, logits.device, logits.dtype), accumulate=True)
    if barred:
        index = to_device(tuple(zip(*barred, strict=True)), logits.device)
        logits.index_put_((index[0], index[1]), logits.new_full((), -math.inf))


def _apply_masks(logits: Tensor, masks: TokenMasks) -> None:
    """Leave the rows of grammars only what these allow."""
    device = logits.device
    packed = to_device(masks.allowed, device)
    barred = _barred_bits(device)[packed.long()].view(torch.bool)[:, : logits.shape[1]]
    if len(masks.rows) < logits.shape[0]:  # filling bools is cheaper than gathering logits
        rows = to_device(masks.rows, device)
        barred = torch.zeros_like(logits, dtype=torch.bool).index_copy_(0, rows, barred)
    logits.masked_fill_(barred, -math.inf)
    for row, token_id in masks.forced:
        logits[row, token_id] = 0.0


@cache
def _barred_bits(device: torch.device) -> Tensor:
    """Eight bools, as one integer, for each byte of a mask: the bits that are not set. -> int64 [256]."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(1 - bits).view(torch.int64)[:, 0].to(device)


def _choose(logits: Tensor, batch: _Batch) -> Tensor:
    """logits: [B, V] -> int64 [B]."""
    token_ids = logits.argmax(-1)
    if rows := batch.rows(_is_partial):
        count = min(max(row.sampling.top_k for row in rows.members), logits.shape[1])
        values, ids = logits[rows.index].topk(count)
        token_ids[rows.index] = _sample_candidates(values, ids, rows)
    if rows := batch.rows(_is_sorted):
        values, ids = logits[rows.index].sort(descending=True)
        token_ids[rows.index] = _sample_candidates(values, ids, rows)
    if rows := batch.rows(_is_plain):
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
    steps = to_device([row.num_output_tokens for row in rows.members], rows.index.device)
    return gumbel(rows.seeds, steps, ids)


def _logprobs(raw: Tensor, token_ids: Tensor, asking: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Of the sampled tokens, [R], and of the K most likely, values and ids [R, K]. raw: [R, V]."""
    chosen = raw.gather(1, token_ids[asking.index, None])[:, 0]
    values, ids = raw.topk(max(row.sampling.logprobs or 0 for row in asking.members))
    return chosen, values, ids


def _token_logprobs(
    token_id: int, num_top: int, chosen: float, values: list[float], ids: list[int]
) -> TokenLogprobs:
    return TokenLogprobs(token_id, chosen, tuple(zip(ids[:num_top], values[:num_top], strict=True)))
