"""The device's owner: loads the model, holds the KV cache and the encoded clips, runs plans. Decides nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.answer import SampledToken
from engine.guidance import Guidance, TokenMasks
from engine.input_batch import InputBatch, build_input_batch
from engine.messages import AudioClip, SequenceId
from engine.sample_row import SampleRow, sample_rows
from engine.sampler import Sampler
from engine.scheduler import SchedulerOutput
from model.attention import AttentionMetadata
from model.kv_cache import allocate_kv_cache, copy_blocks
from model.qwen2_audio import Qwen2Audio

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a plan gave."""

    sampled: dict[SequenceId, tuple[SampledToken, ...]]
    """For every sequence of the plan that samples: its next token, with drafts its next ones."""
    failed_clips: frozenset[str] = frozenset()
    """Content hashes of clips that could not be encoded."""


class ModelRunner:
    """`execute` plans; `release` what an ended sequence leaves behind."""

    def __init__(
        self, model: Qwen2Audio, num_blocks: int, block_size: int, max_num_seqs: int, guidance: Guidance
    ) -> None:
        self.model = model
        self.guidance = guidance
        self.block_size = block_size
        self.device = model.device
        self.kv_cache = allocate_kv_cache(
            model.config.text, num_blocks, block_size, model.kv_cache_dtype, self.device
        )
        self.sampler = Sampler(max_num_seqs, model.config.text.vocab_size, self.device)
        self._clips: dict[str, Tensor] = {}
        """Content hash -> embeddings [A, C]."""

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput) -> StepResult:
        """Encode the new clips, run the packed tokens, sample where a sequence has caught up."""
        for content_hash in plan.evicted_clips:
            self._clips.pop(content_hash, None)
        failed = self._encode(plan.clips_to_encode)
        if not plan.scheduled:
            return StepResult({}, failed)
        copy_blocks(self.kv_cache, [item.block_copy for item in plan.scheduled if item.block_copy])
        sampling = sample_rows(plan)
        masks = self.guidance.fill(sampling)
        hidden = self._forward(build_input_batch(plan, self.block_size))
        return StepResult(self._sample(hidden, sampling, masks), failed)

    def release(self, sequence_id: SequenceId) -> None:
        """Forget an ended sequence. Fine for one never seen."""
        self.sampler.penalties.release(sequence_id)
        self.guidance.release(sequence_id)

    def _forward(self, batch: InputBatch) -> Tensor:
        """-> normalised hidden states of the rows that sample, [B, C]."""
        hidden = self.model.embed(self._to_device(batch.token_ids))
        for rows in batch.audio_rows:
            if (clip := self._clips.get(rows.content_hash)) is not None:
                hidden[rows.target : rows.target + rows.num_rows] = clip[rows.source : rows.source + rows.num_rows]
        metadata = AttentionMetadata(
            query_lens=batch.query_lens,
            seq_lens=batch.seq_lens,
            num_decodes=batch.num_decodes,
            first_blocks=batch.first_blocks,
            block_table=self._to_device(batch.block_table),
            slot_mapping=self._to_device(batch.slot_mapping),
            seq_lens_device=torch.tensor(batch.seq_lens, device=self.device),
            query_starts=torch.tensor(list(accumulate(batch.query_lens, initial=0)), device=self.device),
        )
        hidden = self.model(hidden, self._to_device(batch.positions), self.kv_cache, metadata)
        return hidden[self._to_device(batch.sample_rows)]

    def _sample(
        self, hidden: Tensor, batch: list[SampleRow], masks: Future[TokenMasks] | None
    ) -> dict[SequenceId, tuple[SampledToken, ...]]:
        if not batch:
            return {}
        logits = self.model.compute_logits(hidden)
        return self.sampler.sample(logits, batch, masks.result() if masks else None)

    def _encode(self, clips: Rows[AudioClip]) -> frozenset[str]:
        """Fill `_clips`; when a batch breaks, find the culprit by encoding one at a time. -> hashes that failed."""
        if not clips:
            return frozenset()
        try:
            self._encode_batch(clips)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if len(clips) == 1:
                logger.exception("a clip could not be encoded")
                return frozenset({clips[0].content_hash})
            return frozenset().union(*(self._encode([clip]) for clip in clips))
        return frozenset(
            clip.content_hash for clip in clips if not bool(self._clips[clip.content_hash].isfinite().all())
        )

    def _encode_batch(self, clips: Rows[AudioClip]) -> None:
        samples = [self._to_device(clip.samples) for clip in clips]
        for clip, rows in zip(clips, self.model.encode_audio(samples), strict=True):
            if rows.shape[0] != clip.num_tokens:
                raise ValueError(f"{clip.num_tokens} placeholders for {rows.shape[0]} audio tokens")
            self._clips[clip.content_hash] = rows.clone()  # a view would keep all that were encoded with it

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return torch.tensor(array).to(self.device, non_blocking=True)
