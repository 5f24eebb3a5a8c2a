"""From a checkpoint folder to the parts of an engine: the weights, the memory, the other ranks, what was measured.

Everything is checked and taken here, once: what fails is an EngineStartError, and what stands afterwards serves.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from engine.block_manager import BlockManager
from engine.cuda_graphs import graph_capture
from engine.device import resolve_device
from engine.encoder_cache import EncoderCache
from engine.errors import EngineStartError
from engine.guidance import Guidance
from engine.loading import LoadedRank, load_rank, start_errors
from engine.memory import max_kept_blocks, out_of_memory_means
from engine.messages import EngineArgs, EngineInfo
from engine.model_runner import ModelRunner
from engine.prefix_cache import PrefixCache
from engine.prompt_lookup import PromptLookup
from engine.scheduler import Scheduler
from engine.speculation import Speculation
from engine.workers import OnFailure, Workers
from model.config import MAX_AUDIO_SAMPLES, MAX_MEL_FRAMES, GenerationConfig, Qwen2AudioConfig, num_audio_tokens
from model.loader import Progress
from model.parallel import Shard


def assemble(
    args: EngineArgs, progress: Progress | None = None, on_failure: OnFailure | None = None
) -> tuple[ModelRunner, Scheduler, EngineInfo]:
    """Load the checkpoint and take the memory, on all ranks. Raises EngineStartError that says what to mend.

    on_failure: what to do when another rank fails later.
    """
    with start_errors():
        _check_ranks(args)
        workers = Workers(args, on_failure)
        try:
            return _assemble(args, workers, progress)
        except BaseException:
            workers.kill()
            raise


def _assemble(
    args: EngineArgs, workers: Workers, progress: Progress | None
) -> tuple[ModelRunner, Scheduler, EngineInfo]:
    started = time.monotonic()
    folder = Path(args.model_folder)
    config = Qwen2AudioConfig.from_folder(folder)
    is_overlapped = overlaps(args, resolve_device(args.device, workers.shard))
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
        async_scheduling=is_overlapped,
        cuda_graphs=graphs,
        kv_cache_dtype=str(model.kv_cache_dtype).removeprefix("torch."),
        load_seconds=time.monotonic() - started,
    )
    kept = max_kept_blocks(args, model, loaded.block_size, loaded.max_model_len)
    return runner, _scheduler(args, config, info, model.dtype, kept), info


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


def overlaps(args: EngineArgs, device: torch.device) -> bool:
    """Whether steps do: drafts are made from the tokens of the step before, so that one has to be through."""
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
