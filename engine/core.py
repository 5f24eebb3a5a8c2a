"""The engine's heart: one step is schedule -> execute -> update. One thread, no queues; no clock decides anything.

With overlap, one step is in flight between two calls of `step`: the next one is planned and its forward pass queued
before the result of the one before is taken, so that the host works while the device does.

Built by `EngineCore.build` from a checkpoint folder; what it measured while building is in `info`.
"""

from __future__ import annotations

import logging
import random
import time
from pathlib import Path

import torch

from engine.answer import SampledToken
from engine.block_manager import BlockManager
from engine.cuda_graphs import graph_capture
from engine.device import resolve_device
from engine.encoder_cache import EncoderCache
from engine.errors import EngineStartError, RankError, RequestError
from engine.guidance import Guidance
from engine.loading import LoadedRank, load_rank, start_errors
from engine.memory import max_kept_blocks, out_of_memory_means
from engine.messages import (
    EngineArgs,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    SamplingParams,
    SequenceId,
)
from engine.model_runner import ModelRunner, PendingStep, StepResult
from engine.plan import ScheduledSequence, SchedulerOutput
from engine.prefix_cache import PrefixCache
from engine.prompt_lookup import PromptLookup
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceStatus, choice_seed
from engine.speculation import Speculation
from engine.workers import OnFailure, Workers
from model.config import (
    MAX_AUDIO_SAMPLES,
    MAX_MEL_FRAMES,
    GenerationConfig,
    Qwen2AudioConfig,
    num_audio_tokens,
)
from model.loader import Progress
from model.parallel import Shard

logger = logging.getLogger(__name__)

COMPILE_WAIT_SECONDS = 0.01
"""How long a step without work waits for a grammar before it looks for messages again."""

MAX_FAILED_STEPS = 3
"""Steps in a row in which nothing at all could be computed: then the device is to blame, not a request."""
MAX_CHOICES = 128
"""Of one request, as OpenAI has it."""


class EngineCore:
    """Requests in by `add_request`, tokens out by `step`."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, info: EngineInfo, seed: int | None = None) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.info = info
        self._overlaps = info.async_scheduling
        self._in_flight: PendingStep | None = None
        """Its plan is `Scheduler.update`d by the next step."""
        self._seeds = random.Random(seed)
        self._num_failed_steps = 0
        """In a row, without a sequence that could be computed."""

    @classmethod
    def build(
        cls, args: EngineArgs, progress: Progress | None = None, on_failure: OnFailure | None = None
    ) -> EngineCore:
        """Load the checkpoint and take the memory, on all ranks. Raises EngineStartError that says what to mend.

        on_failure: what to do when another rank fails later.
        """
        with start_errors():
            _check_ranks(args)
            workers = Workers(args, on_failure)
            try:
                return _build(args, workers, progress)
            except BaseException:
                workers.kill()
                raise

    def close(self) -> None:
        """End the other ranks."""
        self.runner.workers.close()

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute something, or soon will."""
        return self.scheduler.has_work or self.runner.guidance.is_compiling or self._in_flight is not None

    @property
    def stats(self) -> EngineStats:
        """Counters as of now."""
        return self.scheduler.stats

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request, all its choices. Raises RequestError when it could never run."""
        self._check(request)
        given = request.sampling.seed
        seed = self._seeds.getrandbits(63) if given is None else given
        choices = [Sequence(request, choice_seed(seed, index), index) for index in range(request.n)]
        if request.sampling.grammar is not None:
            self.runner.guidance.compile(choices)
            return
        for sequence in choices:
            self.scheduler.add(sequence)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one of its choices. Fine when it has just ended."""
        self.runner.guidance.abort(request_id)
        for sequence_id in self.scheduler.abort(request_id, index):
            self.runner.release(sequence_id)

    def step(self) -> list[EngineOutput]:
        """Compute one step; with overlap, begin one and end the one before. -> what was sampled."""
        refused = self._add_compiled()
        if not self._overlaps:
            plan = self.scheduler.schedule()
            return refused + self._update(plan, self._execute(plan))
        before, self._in_flight = self._in_flight, None
        plan = self.scheduler.schedule(before.plan if before else None)
        step = self._begin(plan, before)
        outputs = []
        if before:
            try:
                result = before.result()
            except Exception as error:
                self._start_over(error)
                return refused
            self._num_failed_steps = 0
            outputs = self._update(before.plan, result)
        return refused + outputs + self._go_on(plan, step)

    def _begin(self, plan: SchedulerOutput, before: PendingStep | None) -> PendingStep | Exception:
        """Queue the forward pass. A step that cannot be queued waits until the one before it is through."""
        try:
            return self.runner.launch(plan, before)
        except Exception as error:
            return error

    def _go_on(self, plan: SchedulerOutput, step: PendingStep | Exception) -> list[EngineOutput]:
        """Queue the rest, now that all tokens before it are known. -> outputs only if that fails."""
        if isinstance(step, PendingStep):
            try:
                self.runner.sample(step)
            except Exception as error:
                step = error
        if isinstance(step, Exception):
            return self._update(plan, self._recover(plan, step))
        if plan.clips_to_encode or _unfinished(plan):
            self._in_flight = step
        return []

    def _start_over(self, error: Exception) -> None:
        """The step in flight is lost: compute all that runs again, without overlap, which finds the culprit."""
        logger.error("a step in flight failed; from now on each is waited for", exc_info=error)
        self._num_failed_steps += 1
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise error
        self._overlaps = False
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self.runner.sampler.penalties.release(sequence.sequence_id)
        self.scheduler.recompute_all()

    def _update(self, plan: SchedulerOutput, result: StepResult) -> list[EngineOutput]:
        """Take a result in. -> what it gave to those that have not ended since."""
        if result.encoding:
            plan.note_encoding(*result.encoding)
        unfinished = {item.sequence.sequence_id for item in _unfinished(plan)}
        sampled = {key: token for key, token in result.sampled.items() if key in unfinished}
        outputs = self.scheduler.update(plan, self.runner.guidance.advance(sampled), result.failed_clips)
        for output in outputs:
            if output.finish_reason is not None:
                self.runner.release(output.sequence_id)
        return outputs

    def _add_compiled(self) -> list[EngineOutput]:
        """Queue the sequences whose grammars are ready. -> the last words of those that have none."""
        refused = []
        wait_s = 0.0 if self.scheduler.has_work or self._in_flight else COMPILE_WAIT_SECONDS
        for sequence, error in self.runner.guidance.take_compiled(wait_s):
            if error:
                refused.append(failed(sequence.request_id, error, sequence.index))
            else:
                self.scheduler.add(sequence)
        return refused

    def _execute(self, plan: SchedulerOutput) -> StepResult:
        """Run a plan; when that raises, run its sequences one at a time, so that only the culprit ends."""
        try:
            result = self.runner.execute(plan)
        except Exception as error:
            return self._recover(plan, error)
        self._num_failed_steps = 0
        return result

    def _recover(self, plan: SchedulerOutput, error: Exception) -> StepResult:
        if isinstance(error, RankError):
            raise error
        logger.error(
            "a step failed; its %d sequences are computed one at a time", len(plan.scheduled), exc_info=error
        )
        self._num_failed_steps += 1
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise error
        return self._execute_one_by_one(plan)

    def _execute_one_by_one(self, plan: SchedulerOutput) -> StepResult:
        """Computing a token again writes what it wrote before; only counts of tokens have to be made anew."""
        sampled: dict[SequenceId, tuple[SampledToken, ...]] = {}
        failed_clips: set[str] = set()
        for item in _unfinished(plan):
            self.runner.sampler.penalties.release(item.sequence.sequence_id)
            hashes = {
                clip.content_hash for clip in item.sequence.clips_within(item.start, item.start + item.num_tokens)
            }
            clips = tuple(clip for clip in plan.clips_to_encode if clip.content_hash in hashes)
            try:
                result = self.runner.execute(SchedulerOutput((item,), clips, plan.evicted_clips))
            except RankError:
                raise
            except Exception:
                logger.exception("one sequence fails alone")
                error = SampledToken(0, error="the request failed inside the engine")
                sampled[item.sequence.sequence_id] = (error,)
                continue
            self._num_failed_steps = 0
            sampled |= result.sampled
            failed_clips |= result.failed_clips
        return StepResult(sampled, frozenset(failed_clips))

    def _check(self, request: EngineRequest) -> None:
        """The HTTP side has checked all this; the engine does not trust it with everybody's requests."""
        length = len(request.prompt_token_ids)
        position = 0
        for clip in request.clips:
            if clip.offset < position or clip.offset + clip.num_tokens > length:
                raise RequestError("audio placeholders lie outside the prompt or overlap")
            if not 0 < len(clip.samples) <= MAX_AUDIO_SAMPLES or clip.num_tokens != num_audio_tokens(
                len(clip.samples)
            ):
                raise RequestError("an audio clip's length does not match its placeholders")
            position = clip.offset + clip.num_tokens
        if not 0 < length < self.info.max_model_len:
            raise RequestError(f"a prompt has 1 to {self.info.max_model_len - 1} tokens; this one has {length}")
        if not all(0 <= token < self.info.vocab_size for token in request.prompt_token_ids):
            raise RequestError("the prompt holds a token id outside the vocabulary")
        _check_sampling(request.sampling, self.info.vocab_size)
        if not 1 <= request.n <= MAX_CHOICES:
            raise RequestError(f"n must be 1 to {MAX_CHOICES}")
        if self.scheduler.knows(request.request_id) or self.runner.guidance.knows(request.request_id):
            raise RequestError("the request id is in use")


def _unfinished(plan: SchedulerOutput) -> list[ScheduledSequence]:
    """What is left of a plan when some of its sequences have ended."""
    return [item for item in plan.scheduled if item.sequence.status is not SequenceStatus.FINISHED]


def _check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """What would break a step for everybody. Raises RequestError."""
    ids = (*params.stop_token_ids, *(token for token, _ in params.logit_bias))
    if not all(0 <= token < vocab_size for token in ids):
        raise RequestError("stop_token_ids or logit_bias hold a token id outside the vocabulary")
    if params.seed is not None and not -(1 << 63) <= params.seed < 1 << 63:
        raise RequestError("seed must be a 64-bit integer")
    if params.logprobs is not None and not 0 <= params.logprobs <= vocab_size:
        raise RequestError(f"logprobs must be 0 to {vocab_size}")
    if params.max_tokens < 1:
        raise RequestError("max_tokens must be at least 1")


def failed(request_id: str, reason: str, index: int = 0) -> EngineOutput:
    """The only and last output of a request, or of one of its choices, that the engine refuses."""
    return EngineOutput(request_id, index=index, finish_reason=FinishReason.ERROR, error=reason)


def _build(args: EngineArgs, workers: Workers, progress: Progress | None) -> EngineCore:
    started = time.monotonic()
    folder = Path(args.model_folder)
    config = Qwen2AudioConfig.from_folder(folder)
    overlaps = _overlaps(args, resolve_device(args.device, workers.shard))
    loaded = load_rank(args, workers.shard, progress)
    model = loaded.model
    workers.join(model.device)
    num_blocks = loaded.num_kv_blocks(args)
    guidance = Guidance(
        folder / "tokenizer.json", config.text.vocab_size, GenerationConfig.from_folder(folder).eos_token_ids
    )
    runner, graphs = _runner(args, loaded, num_blocks, guidance, workers)
    workers.wait_ready()
    info = EngineInfo(
        max_model_len=loaded.max_model_len,
        vocab_size=config.text.vocab_size,
        device=_device_name(model.device, workers.shard),
        dtype=str(model.dtype).removeprefix("torch."),
        dtype_reason=loaded.dtype_reason,
        attention_backend=model.backend.name,
        attention_reason=loaded.attention_reason,
        num_blocks=num_blocks,
        block_size=loaded.block_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=loaded.max_num_batched_tokens,
        max_num_batched_tokens_reason=loaded.max_num_batched_tokens_reason,
        async_scheduling=overlaps,
        cuda_graphs=graphs,
        kv_cache_dtype=str(model.kv_cache_dtype).removeprefix("torch."),
        load_seconds=time.monotonic() - started,
    )
    kept = max_kept_blocks(args, model, loaded.block_size, loaded.max_model_len)
    return EngineCore(runner, _scheduler(args, config, info, model.dtype, kept), info, args.seed)


def _runner(
    args: EngineArgs, loaded: LoadedRank, num_blocks: int, guidance: Guidance, workers: Workers
) -> tuple[ModelRunner, str]:
    """-> (the runner, what to tell of its CUDA graphs)."""
    model = loaded.model
    capture, reason = graph_capture(model, args.enforce_eager)
    with out_of_memory_means("for the KV cache: lower --gpu-memory-utilization or --kv-cache-memory-bytes"):
        runner = ModelRunner(model, num_blocks, loaded.block_size, args.max_num_seqs, guidance, workers)
        if capture is None:
            return runner, f"off ({reason})" if model.device.type == "cuda" else ""
        return runner, runner.capture_graphs(capture, args.max_num_seqs, loaded.max_model_len)


def _scheduler(
    args: EngineArgs, config: Qwen2AudioConfig, info: EngineInfo, dtype: torch.dtype, max_kept: int | None
) -> Scheduler:
    row_bytes = config.text.hidden_size * dtype.itemsize
    clip_bytes = num_audio_tokens(MAX_AUDIO_SAMPLES) * row_bytes
    prefix_cache = PrefixCache(info.block_size) if args.enable_prefix_caching else None
    return Scheduler(
        BlockManager(info.num_blocks, info.block_size, prefix_cache, max_kept),
        EncoderCache(max(args.encoder_cache_bytes, clip_bytes), row_bytes),
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_encoder_frames=max(args.max_encoder_frames, MAX_MEL_FRAMES),
        max_model_len=info.max_model_len,
        frame_cost=config.frame_cost,
        speculation=_speculation(args, info.max_model_len),
        long_prefill_token_threshold=args.long_prefill_token_threshold,
    )


def _overlaps(args: EngineArgs, device: torch.device) -> bool:
    """Drafts are made from the tokens of the step before, so that one has to be through."""
    if args.num_speculative_tokens and args.async_scheduling:
        raise EngineStartError(
            "--async-scheduling and --num-speculative-tokens exclude each other: drafts need the tokens before them"
        )
    if args.async_scheduling is None:
        return device.type == "cuda" and not args.num_speculative_tokens
    return args.async_scheduling


def _check_ranks(args: EngineArgs) -> None:
    """What can be known before processes are started. Raises EngineStartError and ConfigError."""
    shard = Shard(size=args.tensor_parallel_size)
    shard.share(Qwen2AudioConfig.from_folder(Path(args.model_folder)).text)
    resolve_device(args.device, shard)


def _device_name(device: torch.device, shard: Shard) -> str:
    name = f"cpu ({torch.get_num_threads()} threads)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return name if shard.size == 1 else f"{shard.size} x {name}"


def _speculation(args: EngineArgs, max_model_len: int) -> Speculation:
    if args.prompt_lookup_min > args.prompt_lookup_max:
        raise EngineStartError(
            f"--prompt-lookup-min {args.prompt_lookup_min} is above --prompt-lookup-max {args.prompt_lookup_max}"
        )
    lookup = PromptLookup(args.prompt_lookup_min, args.prompt_lookup_max)
    return Speculation(lookup, args.num_speculative_tokens, max_model_len)
