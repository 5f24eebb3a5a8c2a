"""Logits -> tokens. Nothing here waits for the device: parameters go there, and `SampledBatch` brings tokens back.

Order of operations, as in transformers: logit bias and stop-token mask, repetition penalty, presence and frequency
penalties, a grammar's mask, then the choice (`choice`): temperature, top-k, top-p, min-p, a sample. Logprobs are of
the raw logits.
"""

from __future__ import annotations

import math
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from engine.answer import SampledToken
from engine.choice import choose
from engine.device import HostCopy, to_device
from engine.guidance import TokenMasks
from engine.messages import SamplingParams, SequenceId, TokenLogprobs
from engine.penalties import PenaltyTable
from engine.row_groups import RowGroup, RowGroups
from engine.sample_row import SampleRow
from engine.verification import verify
from model.triton_kernels.sampling import compile_kernels

NOT_A_NUMBER = "the model's output for this request is not a number"


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
        self._batch = RowGroups([], device)
        """The last one."""
        if device.type == "cuda":
            compile_kernels(vocab_size, device)

    def sample(self, logits: Tensor, members: list[SampleRow], masks: TokenMasks | None = None) -> SampledBatch:
        """A token for each row, and whether it stands (see verification). logits: float32 [B, V], overwritten."""
        if self._batch.members != members:
            self._batch = RowGroups(members, logits.device)
        batch = self._batch
        covered = masks or batch.rows(_has_bias)  # -inf may then stand where NaN was
        broken = logits.isnan().any(-1) if covered else None
        asking = batch.rows(_wants_logprobs)
        raw = logits[asking.index].log_softmax(-1) if asking else None
        _apply_bias(logits, batch)
        penalised = batch.rows(_has_penalty)
        if penalised:
            table_rows = self.penalties.rows([row.sequence for row in penalised.members])
            self._apply_penalties(logits, penalised, table_rows)
        if masks:
            _apply_masks(logits, masks)
        token_ids, are_nan = choose(logits, batch)
        stands = verify(token_ids, members)
        if penalised:
            self.penalties.count(table_rows, token_ids[penalised.index], stands[penalised.index])
        logprobs = _logprobs(raw, token_ids, asking) if asking and raw is not None else ()
        return SampledBatch(members, token_ids, stands, are_nan if broken is None else broken, logprobs)

    def _apply_penalties(self, logits: Tensor, rows: RowGroup, table_rows: Tensor) -> None:
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


def _apply_bias(logits: Tensor, batch: RowGroups) -> None:
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
    return to_device((1 - bits).view(np.int64)[:, 0].copy(), device)


def _logprobs(raw: Tensor, token_ids: Tensor, asking: RowGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Of the sampled tokens, [R], and of the K most likely, values and ids [R, K]. raw: [R, V]."""
    chosen = raw.gather(1, token_ids[asking.index, None])[:, 0]
    values, ids = raw.topk(max(row.sampling.logprobs or 0 for row in asking.members))
    return chosen, values, ids


def _token_logprobs(
    token_id: int, num_top: int, chosen: float, values: list[float], ids: list[int]
) -> TokenLogprobs:
    return TokenLogprobs(token_id, chosen, tuple(zip(ids[:num_top], values[:num_top], strict=True)))
