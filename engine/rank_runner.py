"""What every rank does of a step: its part of the decoder over its part of the KV cache. Without tensor parallelism
there is one rank, which has all of both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.device import to_device
from engine.input_batch import ForwardStep, InputBatch, LogitRows
from model.attention import AttentionMetadata
from model.kv_cache import allocate_kv_cache, copy_blocks
from model.qwen2_audio import Qwen2Audio

Fill = Callable[[Tensor], None]


def _nothing(_: Tensor) -> None:
    """Rank 0 brings it."""


class RankRunner:
    """See the module's docstring. Ranks run the same batches in the same order, each call to its end."""

    def __init__(self, model: Qwen2Audio, num_blocks: int, block_size: int) -> None:
        self.model = model
        self.block_size = block_size
        self.device = model.device
        self.kv_cache = allocate_kv_cache(
            model.config.text, num_blocks, block_size, model.kv_cache_dtype, self.device
        )

    @torch.inference_mode()
    def forward(self, step: ForwardStep, put_tokens: Fill = _nothing, put_clips: Fill = _nothing) -> Tensor:
        """Queue the forward pass. -> normalised hidden states of the rows that are wanted, [R, C].

        put_tokens: fills pending tokens into [T]; put_clips: clips into [T, C]. Rank 0 alone has what these need.
        """
        batch = step.batch
        self.copy_blocks(batch)
        packed = to_device(batch.packed, self.device)
        token_ids, positions, slot_mapping, seq_lens, query_starts, block_table = torch.split(
            packed, batch.section_lens
        )
        shard = self.model.shard
        if batch.pending:
            put_tokens(token_ids)
            shard.broadcast(token_ids)
        hidden = self.model.embed(token_ids)
        if batch.audio_rows:
            put_clips(hidden)
            shard.broadcast(hidden)
        metadata = AttentionMetadata(
            query_lens=batch.query_lens,
            seq_lens=batch.seq_lens,
            num_decodes=batch.num_decodes,
            first_blocks=batch.first_blocks,
            block_table=block_table.view(len(batch.query_lens), -1),
            slot_mapping=slot_mapping,
            seq_lens_device=seq_lens,
            query_starts=query_starts,
        )
        rows = to_device(step.wanted, self.device, torch.int64) if len(step.wanted) < len(token_ids) else None
        return self.model(hidden, positions, self.kv_cache, metadata, rows)

    def copy_blocks(self, batch: InputBatch) -> None:
        """Queue the copies that come before a batch."""
        if batch.block_copies:
            copy_blocks(self.kv_cache, to_device(batch.block_copies, self.device))

    @torch.inference_mode()
    def logits(self, hidden: Tensor, wanted: LogitRows) -> Tensor:
        """Queue the logits of what `forward` gave. hidden: [R, C] -> as `Qwen2Audio.compute_logits`."""
        if wanted.places is not None:
            hidden = hidden[to_device(wanted.places, self.device)]
        return self.model.compute_logits(hidden)
