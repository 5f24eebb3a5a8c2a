"""Which tokens a sequence has seen, on the device: what the penalties and the repetition penalty look at.

A sequence that asks for a penalty gets a row when it first samples and keeps it until it ends, or, while it does not
run, until another needs the row: it can be made again from the tokens. Rows are counts over the vocabulary, so the
tables exist only once somebody asks for a penalty.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.device import to_device
from engine.messages import SequenceId
from engine.sequence import Sequence, SequenceStatus


class PenaltyTable:
    """See the module's docstring. At most `max_num_seqs` sequences run at once."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (max_num_seqs, vocab_size)
        self._device = device
        self._in_prompt: Tensor | None = None
        """bool [R, V]"""
        self._output_counts: Tensor | None = None
        """int32 [R, V]"""
        self._row_of: dict[SequenceId, int] = {}
        self._owners: dict[SequenceId, Sequence] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def rows(self, sequences: list[Sequence]) -> Tensor:
        """Row of each sequence, made on first sight. -> int64 [R]."""
        return to_device([self._row(sequence) for sequence in sequences], self._device)

    def in_prompt(self, rows: Tensor) -> Tensor:
        """rows: [R] -> bool [R, V]."""
        assert self._in_prompt is not None
        return self._in_prompt[rows]

    def output_counts(self, rows: Tensor, drafts: list[tuple[int, ...]]) -> Tensor:
        """With the drafts that each row takes for granted. rows: [R], drafts: R of them -> int32 [R, V]."""
        assert self._output_counts is not None
        counts = self._output_counts[rows]
        where = [(row, token_id) for row, token_ids in enumerate(drafts) for token_id in token_ids]
        if where:
            index, token_ids = to_device(where, self._device).unbind(1)
            counts.index_put_((index, token_ids), counts.new_ones(len(where)), accumulate=True)
        return counts

    def count(self, rows: Tensor, token_ids: Tensor, stands: Tensor) -> None:
        """Add the sampled tokens that stand. rows, token_ids: [R]; stands: bool [R]."""
        assert self._output_counts is not None
        self._output_counts.index_put_((rows, token_ids), stands.int(), accumulate=True)

    def release(self, sequence_id: SequenceId) -> None:
        """Give the row of an ended sequence back, if it had one."""
        if self._owners.pop(sequence_id, None) is not None:
            self._free.append(self._row_of.pop(sequence_id))

    def _row(self, sequence: Sequence) -> int:
        if sequence.sequence_id in self._row_of:
            return self._row_of[sequence.sequence_id]
        if self._in_prompt is None or self._output_counts is None:
            self._in_prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._output_counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        if not self._free:
            idle = (owner for owner in self._owners.values() if owner.status is not SequenceStatus.RUNNING)
            self.release(next(idle).sequence_id)
        row = self._row_of[sequence.sequence_id] = self._free.pop()
        self._owners[sequence.sequence_id] = sequence
        prompt = to_device(sequence.request.prompt_token_ids, self._device)
        self._in_prompt[row].fill_(False).index_fill_(0, prompt, True)
        output = to_device(sequence.token_ids[sequence.num_prompt_tokens :], self._device, torch.int64)
        ones = torch.ones_like(output, dtype=torch.int32)
        self._output_counts[row].zero_().index_put_((output,), ones, accumulate=True)
        return row
