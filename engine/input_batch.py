"""A plan -> the packed arrays of one forward pass. Pure: numpy in, numpy out, no device, no state. Torch-free.

All arrays of a batch are views of one, `packed`, so that one copy brings them to the device, and one message to the
other ranks of a tensor-parallel engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from engine.messages import SequenceId
from engine.plan import ScheduledSequence, SchedulerOutput

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AudioRows:
    """Rows [source, source + num_rows) of a clip's embeddings replace rows [target, ...) of the packed input."""

    content_hash: str
    source: int
    target: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class InputBatch:
    """T tokens of B sequences, decodes first."""

    packed: Int32Array
    """End to end: token_ids [T] (0 where one is pending), positions [T], slot_mapping [T] (block * block_size +
    offset), seq_lens [B], query starts [B + 1] (the first row of each sequence, and the end), block_table [B, M]
    (rows padded with the null block)."""
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_decodes: int
    first_blocks: tuple[int | None, ...]
    """Of each sequence whose blocks in use are consecutive."""
    last_rows: tuple[int, ...]
    """Of each sequence, its last row of the packed tokens; those of its drafts are the last ones."""
    pending: tuple[tuple[int, SequenceId], ...]
    """Rows whose token is what the step in flight samples for a sequence."""
    audio_rows: tuple[AudioRows, ...]
    block_copies: tuple[tuple[int, int], ...]
    """From block, to block, before the step writes."""

    @property
    def section_lens(self) -> list[int]:
        """Lengths of the parts of `packed`."""
        num_tokens, num_rows = sum(self.query_lens), len(self.query_lens)
        own = [num_tokens, num_tokens, num_tokens, num_rows, num_rows + 1]
        return [*own, len(self.packed) - sum(own)]

    @property
    def sections(self) -> tuple[Int32Array, ...]:
        """The parts of `packed`, the block table as [B, M]."""
        *of_rows, block_table = np.split(self.packed, np.cumsum(self.section_lens)[:-1])
        return (*of_rows, block_table.reshape(len(self.query_lens), -1))


@dataclass(frozen=True, slots=True)
class ForwardStep:
    """A forward pass, as all ranks are told."""

    batch: InputBatch
    wanted: tuple[int, ...]
    """Packed rows whose hidden states are asked for."""


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Which of the rows that the forward pass before gave have their logits computed, as all ranks are told."""

    places: tuple[int, ...] | None
    """None: all of them."""


def build_input_batch(plan: SchedulerOutput, block_size: int) -> InputBatch:
    """Lay the scheduled tokens end to end."""
    items = plan.scheduled
    lens = np.array([item.num_tokens for item in items], dtype=np.int32)
    starts = np.array([item.start for item in items], dtype=np.int32)
    tables = [item.sequence.block_table for item in items]
    table_lens = np.array([len(table) for table in tables])
    ends = lens.cumsum(dtype=np.int32)
    num_tokens, num_rows, width = int(ends[-1]), len(items), int(table_lens.max())
    packed = np.zeros(3 * num_tokens + num_rows * (2 + width) + 1, dtype=np.int32)
    token_ids, positions, slot_mapping = packed[: 3 * num_tokens].reshape(3, num_tokens)
    seq_lens, query_starts, block_table = np.split(packed[3 * num_tokens :], [num_rows, 2 * num_rows + 1])
    block_table = block_table.reshape(num_rows, width)

    np.add(starts, lens, out=seq_lens)
    query_starts[1:] = ends
    block_table[np.arange(width) < table_lens[:, None]] = np.fromiter(chain.from_iterable(tables), dtype=np.int32)
    rows = np.repeat(np.arange(num_rows, dtype=np.int32), lens)
    np.subtract(np.arange(num_tokens, dtype=np.int32), (ends - lens - starts)[rows], out=positions)
    blocks, offsets = np.divmod(positions, block_size)
    np.add(block_table[rows, blocks] * block_size, offsets, out=slot_mapping)
    last_rows = tuple((ends - 1).tolist())
    pending = tuple(
        (row, item.sequence.sequence_id) for row, item in zip(last_rows, items, strict=True) if _ends_pending(item)
    )
    token_ids[:] = _token_ids(items)
    return InputBatch(
        packed=packed,
        query_lens=tuple(lens.tolist()),
        seq_lens=tuple(seq_lens.tolist()),
        num_decodes=int(np.count_nonzero(lens == 1)),
        first_blocks=_first_blocks(block_table, -(-seq_lens // block_size)),
        last_rows=last_rows,
        pending=pending,
        audio_rows=tuple(_audio_rows(items, ends)),
        block_copies=tuple(item.block_copy for item in items if item.block_copy),
    )


def decode_section(num_rows: int) -> int:
    """Places that `num_rows` numbers take in `pad_decodes`: what follows them begins at a multiple of 16 bytes."""
    return -(-num_rows // 4) * 4


def pad_decodes(batch: InputBatch, num_rows: int, width: int, rows_before: Mapping[SequenceId, int]) -> Int32Array:
    """A batch of one token for each sequence, padded with rows that are of length 0 and write nothing.

    rows_before: of each sequence with a pending token, its row in the step before. -> token_ids, positions,
    slot_mapping, seq_lens, and rows of pending tokens (-1: known), each in `decode_section(num_rows)` places; then
    the block table [num_rows, width]; end to end.
    """
    section, num_seqs = decode_section(num_rows), len(batch.query_lens)
    packed = np.zeros(5 * section + num_rows * width, dtype=np.int32)
    token_ids, positions, slot_mapping, seq_lens, sources = packed[: 5 * section].reshape(5, section)
    *of_rows, _, block_table = batch.sections
    for padded, given in zip((token_ids, positions, slot_mapping, seq_lens), of_rows, strict=True):
        padded[:num_seqs] = given
    slot_mapping[num_seqs:] = -1
    sources[:] = -1
    for row, sequence_id in batch.pending:
        sources[row] = rows_before[sequence_id]
    block_table = block_table[:, :width]  # spare blocks may lie past the longest context
    packed[5 * section :].reshape(num_rows, width)[:num_seqs, : block_table.shape[1]] = block_table
    return packed


def _ends_pending(item: ScheduledSequence) -> bool:
    """Whether its last token is sampled by the step in flight."""
    sequence = item.sequence
    return bool(sequence.num_pending_tokens) and item.start + item.num_tokens == sequence.num_tokens


def _token_ids(items: tuple[ScheduledSequence, ...]) -> list[int]:
    """Of all items, drafts included, 0 where one is pending."""
    token_ids: list[int] = []
    for item in items:
        token_ids += item.sequence.token_ids[item.start : item.start + item.num_tokens]
        token_ids += item.draft_token_ids
        if _ends_pending(item):
            token_ids.append(0)
    return token_ids


def _first_blocks(block_table: Int32Array, num_used: Int32Array) -> tuple[int | None, ...]:
    """The first block of each row if those in use follow each other, else None."""
    places = np.arange(block_table.shape[1])
    in_place = (block_table == block_table[:, :1] + places) | (places >= num_used[:, None])
    firsts = zip(block_table[:, 0].tolist(), in_place.all(axis=1).tolist(), strict=True)
    return tuple(first if is_run else None for first, is_run in firsts)


def _audio_rows(items: tuple[ScheduledSequence, ...], ends: Int32Array) -> list[AudioRows]:
    rows = []
    for item, end in zip(items, ends.tolist(), strict=True):
        shift = end - item.num_tokens - item.start  # from a position of the sequence to a packed row
        for clip in item.sequence.clips_within(item.start, item.start + item.num_tokens):
            first = max(item.start, clip.offset)
            last = min(item.start + item.num_tokens, clip.offset + clip.num_tokens)
            rows.append(AudioRows(clip.content_hash, first - clip.offset, first + shift, last - first))
    return rows
