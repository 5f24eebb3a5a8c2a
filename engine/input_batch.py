"""A plan -> the packed arrays of one forward pass. Pure: numpy in, numpy out, no device, no state. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.scheduler import ScheduledSequence, SchedulerOutput

Int64Array = NDArray[np.int64]


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

    token_ids: Int64Array
    """[T]"""
    positions: Int64Array
    """[T]"""
    slot_mapping: Int64Array
    """[T]: block * block_size + offset."""
    block_table: Int64Array
    """[B, M]: rows padded with the null block."""
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_decodes: int
    first_blocks: tuple[int | None, ...]
    """Of each sequence whose blocks in use are consecutive."""
    sample_rows: Int64Array
    """Rows of the packed output that sample, in the plan's order of those sequences; one for each draft, and one."""
    audio_rows: tuple[AudioRows, ...]


def build_input_batch(plan: SchedulerOutput, block_size: int) -> InputBatch:
    """Lay the scheduled tokens end to end."""
    items = plan.scheduled
    query_lens = tuple(item.num_tokens for item in items)
    ends = np.cumsum(query_lens, dtype=np.int64)
    positions = np.concatenate([np.arange(item.start, item.start + item.num_tokens) for item in items])
    tables = [np.asarray(item.sequence.block_table, dtype=np.int64) for item in items]
    blocks = np.concatenate(
        [table[_block_span(item, block_size)] for table, item in zip(tables, items, strict=True)]
    )
    block_table = np.zeros((len(items), max(len(table) for table in tables)), dtype=np.int64)
    for row, table in enumerate(tables):
        block_table[row, : len(table)] = table
    return InputBatch(
        token_ids=np.concatenate([np.asarray(_token_ids(item), dtype=np.int64) for item in items]),
        positions=positions,
        slot_mapping=blocks * block_size + positions % block_size,
        block_table=block_table,
        query_lens=query_lens,
        seq_lens=tuple(item.start + item.num_tokens for item in items),
        num_decodes=sum(1 for length in query_lens if length == 1),
        first_blocks=tuple(_first_block(item, block_size) for item in items),
        sample_rows=np.array(
            [
                row
                for end, item in zip(ends, items, strict=True)
                if item.samples
                for row in range(end - 1 - len(item.draft_token_ids), end)
            ],
            dtype=np.int64,
        ),
        audio_rows=tuple(_audio_rows(items, ends)),
    )


def _token_ids(item: ScheduledSequence) -> list[int]:
    """What the plan computes of a sequence, drafts included."""
    return item.sequence.token_ids[item.start : item.start + item.num_tokens] + list(item.draft_token_ids)


def _first_block(item: ScheduledSequence, block_size: int) -> int | None:
    """The first block if those in use follow each other, else None."""
    table = item.sequence.block_table
    num_used = -(-(item.start + item.num_tokens) // block_size)
    return table[0] if table[:num_used] == list(range(table[0], table[0] + num_used)) else None


def _block_span(item: ScheduledSequence, block_size: int) -> Int64Array:
    """Index into the block table for each scheduled token."""
    return np.arange(item.start, item.start + item.num_tokens) // block_size


def _audio_rows(items: tuple[ScheduledSequence, ...], ends: Int64Array) -> list[AudioRows]:
    rows = []
    for item, end in zip(items, ends, strict=True):
        shift = int(end) - item.num_tokens - item.start  # from a position of the sequence to a packed row
        for clip in item.sequence.clips_within(item.start, item.start + item.num_tokens):
            first = max(item.start, clip.offset)
            last = min(item.start + item.num_tokens, clip.offset + clip.num_tokens)
            rows.append(AudioRows(clip.content_hash, first - clip.offset, first + shift, last - first))
    return rows
