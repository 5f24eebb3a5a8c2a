"""The device's owner: loads the model, holds the KV cache and the encoded clips, runs plans. Decides nothing.

A plan is run in three parts, and only the last waits for the device: `launch` queues its forward pass, `sample` what
chooses the tokens, `PendingStep.result` brings them to the host. `launch` may come before the result of the step
before: the tokens that one samples are then read on the device. `sample` needs them on the host, for the masks of
grammars and to leave out who has ended; the device is busy with the forward pass meanwhile. On a CPU a part has run
when its call returns. With tensor parallelism this is rank 0: what the ranks compute together is told to the others
by `workers`, and computed as they do (`RankRunner`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from engine.answer import SampledToken
from engine.cuda_graphs import Capture, DecodeGraphs
from engine.device import DeviceStopwatch, HostCopy, to_device
from engine.encoder_graphs import EncoderGraphs
from engine.guidance import Guidance, TokenMasks
from engine.input_batch import ForwardStep, InputBatch, LogitRows, build_input_batch
from engine.messages import AudioClip, SequenceId
from engine.plan import SchedulerOutput
from engine.rank_runner import RankRunner
from engine.sample_row import sample_rows
from engine.sampler import SampledBatch, Sampler
from engine.workers import Workers
from model.qwen2_audio import Qwen2Audio

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a plan gave."""

    sampled: dict[SequenceId, tuple[SampledToken, ...]]
    """For every sequence of the plan that samples: its next token, with drafts its next ones."""
    failed_clips: frozenset[str] = frozenset()
    """Content hashes of clips that could not be encoded."""
    encoding: tuple[float, float] | None = None
    """When the encoder run of the step began (`time.monotonic`), and its seconds on the device."""


@dataclass(slots=True)
class EncodedClips:
    """What became of the clips that a step encodes."""

    broken: frozenset[str] = frozenset()
    """Content hashes of those that raised."""
    hashes: tuple[str, ...] = ()
    """Of the others."""
    are_finite: HostCopy | None = None
    """bool, for each of `hashes`."""
    watch: DeviceStopwatch | None = None
    """Of the run."""

    def times(self) -> tuple[float, float] | None:
        """When the run began, and its seconds. Waits for the device."""
        return (self.watch.began, self.watch.seconds()) if self.watch else None

    def failed(self) -> frozenset[str]:
        """Content hashes of clips without usable embeddings. Waits for the device."""
        if self.are_finite is None:
            return self.broken
        (are_finite,) = self.are_finite.wait()
        finite = zip(self.hashes, are_finite.tolist(), strict=True)
        return self.broken.union(content_hash for content_hash, is_finite in finite if not is_finite)


@dataclass(slots=True)
class PendingStep:
    """A plan that the device is at work on."""

    plan: SchedulerOutput
    encoded: EncodedClips
    hidden: Tensor | None = None
    """[R, C], normalised: of the packed rows that may be sampled. None when none is, or `logits` are there."""
    logits: Tensor | None = None
    """float32 [B, V], of all sequences of a replayed step, until the next is launched."""
    last_rows: tuple[int, ...] = ()
    """Of each sequence of the plan, its last packed row."""
    place_of: dict[int, int] = field(default_factory=dict)
    """Packed row -> row of `hidden`."""
    masks: Future[TokenMasks] | None = None
    """Of all that sample, when they could be begun with the forward pass."""
    sampled: SampledBatch | None = None

    def result(self) -> StepResult:
        """Waits for the device. Raises what went wrong there."""
        return StepResult(self.sampled.result() if self.sampled else {}, self.encoded.failed(), self.encoded.times())


class ModelRunner(RankRunner):
    """Runs plans, see the module's docstring; `release` what an ended sequence leaves behind."""

    def __init__(
        self,
        model: Qwen2Audio,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        guidance: Guidance,
        workers: Workers,
    ) -> None:
        super().__init__(model, num_blocks, block_size)
        self.guidance = guidance
        self.workers = workers
        self.sampler = Sampler(max_num_seqs, model.config.text.vocab_size, self.device)
        self.graphs: DecodeGraphs | None = None
        self.encoder_graphs: EncoderGraphs | None = None
        self._clips: dict[str, Tensor] = {}
        """Content hash -> embeddings [A, C]."""

    def capture_graphs(self, capture: Capture, max_num_seqs: int, max_model_len: int) -> str:
        """From now on replay what can be replayed. -> what to tell of it."""
        self.graphs = DecodeGraphs(self.model, self.kv_cache, max_num_seqs, max_model_len, capture)
        self.graphs.capture()
        self.encoder_graphs = EncoderGraphs(self.model, capture)
        self.encoder_graphs.capture()
        return f"{self.graphs}; {self.encoder_graphs}"

    def execute(self, plan: SchedulerOutput) -> StepResult:
        """All parts, one after the other."""
        step = self.launch(plan)
        self.sample(step)
        return step.result()

    @torch.inference_mode()
    def launch(self, plan: SchedulerOutput, before: PendingStep | None = None) -> PendingStep:
        """Queue the new clips' encoder run and the forward pass. `before`: the step whose tokens are pending."""
        for content_hash in plan.evicted_clips:
            self._clips.pop(content_hash, None)
        step = PendingStep(plan, self._encode_all(plan.clips_to_encode))
        if plan.scheduled:
            batch = build_input_batch(plan, self.block_size)
            step.last_rows = batch.last_rows
            wanted = sample_rows(plan, step.last_rows)
            step.place_of = {row: place for place, row in enumerate(wanted)}
            if before is None:
                step.masks = self.guidance.fill(list(wanted.values()))
            if self.graphs and self.graphs.takes(batch):
                step.logits = self._replay(self.graphs, batch, before)
            else:
                step.hidden = self._forward(batch, before, list(wanted))
        return step

    @torch.inference_mode()
    def sample(self, step: PendingStep) -> None:
        """Queue the choice of tokens for the sequences that have not ended; nothing of them is pending any more."""
        rows = sample_rows(step.plan, step.last_rows)
        if not rows:
            return
        batch = list(rows.values())
        masks = step.masks or self.guidance.fill(batch)
        logits = self._logits(step, list(rows))
        step.sampled = self.sampler.sample(logits, batch, masks.result() if masks else None)

    def without_embeddings(self, clips: Rows[AudioClip]) -> frozenset[str]:
        """Content hashes of those that are not here: whoever brings such a clip has to have it encoded."""
        return frozenset(clip.content_hash for clip in clips) - self._clips.keys()

    def release(self, sequence_id: SequenceId) -> None:
        """Forget an ended sequence. Fine for one never seen."""
        self.sampler.penalties.release(sequence_id)
        self.guidance.release(sequence_id)

    def _logits(self, step: PendingStep, rows: list[int]) -> Tensor:
        """Of these packed rows of the step, to be overwritten. -> float32 [R, V]."""
        if step.logits is not None:
            whole = len(rows) == len(step.logits)
            return step.logits if whole else step.logits[to_device(rows, self.device)]
        have_ended = len(rows) < len(step.place_of)
        wanted = LogitRows(tuple(step.place_of[row] for row in rows) if have_ended else None)
        assert step.hidden is not None
        hidden, step.hidden = step.hidden, None
        with self.workers.in_step(wanted):
            return self.logits(hidden, wanted)

    def _replay(self, graphs: DecodeGraphs, batch: InputBatch, before: PendingStep | None) -> Tensor:
        """-> float32 [B, V]."""
        self.copy_blocks(batch)
        if not batch.pending:
            return graphs.replay(batch, {}, None)
        assert before is not None
        assert before.sampled is not None
        return graphs.replay(batch, before.sampled.row_of, before.sampled.token_ids)

    def _forward(self, batch: InputBatch, before: PendingStep | None, wanted: list[int]) -> Tensor:
        """-> normalised hidden states of the packed rows that are wanted, [R, C]."""
        step = ForwardStep(batch, tuple(wanted))
        with self.workers.in_step(step):
            return self.forward(step, partial(self._put_tokens, batch, before), partial(self._put_clips, batch))

    def _put_tokens(self, batch: InputBatch, before: PendingStep | None, token_ids: Tensor) -> None:
        """Fill in what the step before samples. token_ids: [T]."""
        assert before is not None
        assert before.sampled is not None
        rows = [(row, before.sampled.row_of[sequence_id]) for row, sequence_id in batch.pending]
        targets, sources = to_device(rows, self.device).unbind(1)
        token_ids[targets] = before.sampled.token_ids[sources].int()

    def _put_clips(self, batch: InputBatch, hidden: Tensor) -> None:
        """Replace the placeholders' embeddings. hidden: [T, C]."""
        for clip in batch.audio_rows:
            if (rows_of_clip := self._clips.get(clip.content_hash)) is not None:
                rows_of_clip = rows_of_clip[clip.source : clip.source + clip.num_rows]
                hidden[clip.target : clip.target + clip.num_rows] = rows_of_clip

    def _encode_all(self, clips: Rows[AudioClip]) -> EncodedClips:
        """Fill `_clips`."""
        if not clips:
            return EncodedClips()
        watch = DeviceStopwatch(self.device)
        broken = self._encode(clips)
        watch.stop()
        hashes = tuple(clip.content_hash for clip in clips if clip.content_hash not in broken)
        if not hashes:
            return EncodedClips(broken, watch=watch)
        are_finite = torch.stack([self._clips[content_hash].isfinite().all() for content_hash in hashes])
        return EncodedClips(broken, hashes, HostCopy(are_finite), watch)

    def _encode(self, clips: Rows[AudioClip]) -> frozenset[str]:
        """When a batch breaks, find the culprit by encoding one at a time. -> hashes of those that raised."""
        try:
            self._encode_batch(clips)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if len(clips) == 1:
                logger.exception("a clip could not be encoded")
                return frozenset({clips[0].content_hash})
            return frozenset().union(*(self._encode([clip]) for clip in clips))
        return frozenset()

    def _encode_batch(self, clips: Rows[AudioClip]) -> None:
        samples = [clip.samples for clip in clips]
        if self.encoder_graphs and self.encoder_graphs.takes(samples):
            embeddings = self.encoder_graphs.encode(samples)
        else:
            embeddings = self.model.encode_audio(samples)
        for clip, rows in zip(clips, embeddings, strict=True):
            if rows.shape[0] != clip.num_tokens:
                raise ValueError(f"{clip.num_tokens} placeholders for {rows.shape[0]} audio tokens")
            self._clips[clip.content_hash] = rows.clone()  # a view would keep, or become, what others are encoded to
