"""How many KV blocks fit: on CUDA what the worst step leaves when it is run once, on a CPU a fixed budget.

On CUDA the KV cache gets `gpu_memory_utilization` of the card, less what others have of it, less the most that the
allocator held while the largest encoder run, the largest step and the dearest sampling ran, less CUDA graphs, less
the encoder's cache. What the allocator held, not what was in use: fragmentation takes the difference in service too.
Nothing that is computed in service is larger than what was run here, so service does not run out of memory.
Of several ranks each has its heads' part of a block, and all have as many blocks as fit on the fullest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.choice import MAX_PARTIAL
from engine.cuda_graphs import DecodeGraphs, graph_capture
from engine.device import free_bytes
from engine.encoder_graphs import EncoderGraphs
from engine.errors import EngineStartError
from engine.messages import EngineArgs, EngineRequest, SamplingParams
from engine.sample_row import SampleRow
from engine.sampler import Sampler
from engine.sequence import Sequence
from model.attention import AttentionMetadata
from model.clip_pack import Samples
from model.config import HOP_LENGTH, MAX_AUDIO_SAMPLES, MAX_MEL_FRAMES, num_audio_tokens
from model.kv_cache import allocate_kv_cache, bytes_per_block, copy_blocks
from model.qwen2_audio import Qwen2Audio

CPU_KV_BYTES = 2 << 30
"""Default budget on a CPU. Pages are touched only when they are first used."""


CPU_KEPT_BYTES = 128 << 20
"""Of the KV cache, on a CPU: what nobody uses is kept up to here, or one whole context if that is more, rather than
until all pages have been touched."""


@contextmanager
def out_of_memory_means(advice: str) -> Iterator[None]:
    """Memory that runs out in here at the start is an EngineStartError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineStartError(f"the GPU's memory ran out {advice}") from error


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Where a GPU's memory goes before the KV cache takes the rest, in bytes."""

    total: int
    elsewhere: int
    """Other processes', and this one's that torch's allocator does not know: the driver's, libraries'."""
    needed: int
    """Weights, and the most that any step takes."""
    graphs: int
    encoder_cache: int

    def left(self, utilization: float) -> int:
        """For the KV cache; negative when there is nothing."""
        return int(self.total * utilization) - self.elsewhere - self.needed - self.graphs - self.encoder_cache

    def __str__(self) -> str:
        total, elsewhere, needed, graphs, encoder_cache = (
            f"{size / 2**30:.2f}"
            for size in (self.total, self.elsewhere, self.needed, self.graphs, self.encoder_cache)
        )
        return (
            f"of {total} GiB, other processes and the driver have {elsewhere}, weights and the largest step take "
            f"{needed}, CUDA graphs {graphs}, encoded clips {encoder_cache}"
        )


def max_kept_blocks(args: EngineArgs, model: Qwen2Audio, block_size: int, max_model_len: int) -> int | None:
    """How many computed blocks that nobody uses stay cached; None: all."""
    block_bytes = bytes_per_block(model.config.text, block_size, model.kv_cache_dtype)
    if args.prefix_cache_bytes is not None:
        return args.prefix_cache_bytes // block_bytes
    if model.device.type == "cuda":
        return None
    return max(CPU_KEPT_BYTES // block_bytes, -(-max_model_len // block_size))


def num_kv_blocks(args: EngineArgs, model: Qwen2Audio, block_size: int, max_model_len: int) -> int:
    """Blocks to allocate, the null block included. Raises EngineStartError when one full context does not fit."""
    block_bytes = bytes_per_block(model.config.text, block_size, model.kv_cache_dtype)
    per_sequence = -(-max_model_len // block_size)
    most = args.max_num_seqs * per_sequence  # more could never be used
    budget, where = _budget(args, model, block_size, max_model_len)
    num_blocks = min(most, model.shard.minimum(budget // block_bytes, model.device))
    if num_blocks < per_sequence:
        raise EngineStartError(
            f"the KV cache holds {max(0, num_blocks) * block_size} tokens, --max-model-len is {max_model_len}: "
            f"lower that, or give the cache {per_sequence * block_bytes} bytes by --kv-cache-memory-bytes{where}"
        )
    return num_blocks + 1


def _budget(args: EngineArgs, model: Qwen2Audio, block_size: int, max_model_len: int) -> tuple[int, str]:
    """-> (bytes for the KV cache, what else to lower if they are too few)."""
    if args.kv_cache_memory_bytes is not None:
        return args.kv_cache_memory_bytes, ""
    if model.device.type != "cuda":
        return CPU_KV_BYTES // model.shard.size, ""
    use = measure(args, model, block_size, max_model_len)
    return use.left(args.gpu_memory_utilization), (
        " or more by --gpu-memory-utilization; or lower --max-num-batched-tokens or --max-num-seqs, "
        f"or set --enforce-eager: {use}"
    )


def measure(args: EngineArgs, model: Qwen2Audio, block_size: int, max_model_len: int) -> MemoryUse:
    """Run the worst that can come, on CUDA. Raises EngineStartError when that alone is too much."""
    device, text = model.device, model.config.text
    clip_bytes = num_audio_tokens(MAX_AUDIO_SAMPLES) * text.hidden_size * model.dtype.itemsize
    with out_of_memory_means("in the largest step: lower --max-num-batched-tokens or --max-num-seqs"):
        num_blocks = 1 + -(-_token_budget(args) // block_size)
        kv_cache = allocate_kv_cache(text, num_blocks, block_size, model.kv_cache_dtype, device)
        needed = peak_bytes(device, partial(run_largest_step, args, model, kv_cache))
    kv_bytes = kv_cache.numel() * kv_cache.element_size()
    free, total = torch.cuda.mem_get_info(device)
    elsewhere = total - free - torch.cuda.memory_reserved(device)
    capture, _ = graph_capture(model, args.enforce_eager)
    graphs = 0
    if capture is not None:
        with out_of_memory_means("for CUDA graphs: lower --max-num-seqs, or set --enforce-eager"):
            before = free_bytes(device)
            decode = DecodeGraphs(model, kv_cache, args.max_num_seqs, max_model_len, capture)
            encoder = EncoderGraphs(model, capture)
            graphs = before - free_bytes(device) + graph_bytes(decode) + graph_bytes(encoder)
            del decode, encoder
    del kv_cache
    torch.cuda.empty_cache()
    return MemoryUse(total, elsewhere, needed - kv_bytes, graphs, max(args.encoder_cache_bytes, clip_bytes))


def peak_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """The most that the allocator held of the device while something ran, what was there before included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    return peak


def graph_bytes(graphs: DecodeGraphs | EncoderGraphs) -> int:
    """What all graphs will take: the largest brings the memory that all share, each of the others as much as one."""
    *others, largest = graphs.sizes
    graphs.capture(largest)
    shared = graphs.num_bytes
    if not others:
        return shared
    graphs.capture(others[-1])
    return shared + len(others) * max(0, graphs.num_bytes - shared)


@torch.inference_mode()
def run_largest_step(args: EngineArgs, model: Qwen2Audio, kv_cache: Tensor) -> None:
    """The dearest way to sample, whose tables stay; then the encoder's largest runs, copies of blocks for as many
    choices as can begin at once, and a sequence that fills the token budget, sampled again.
    """
    device, num_tokens = model.device, _token_budget(args)
    members = _dearest_rows(args)[:num_tokens]
    if model.shard.rank == 0:
        sampler = Sampler(args.max_num_seqs, model.config.text.vocab_size, device)
        sampler.sample(torch.zeros(len(members), model.config.text.vocab_size, device=device), members).result()
        for clips in _largest_runs(args):
            model.encode_audio(clips)
    copy_blocks(kv_cache, torch.zeros(args.max_num_seqs, 2, dtype=torch.int64, device=device))
    positions = torch.arange(num_tokens, dtype=torch.int32, device=device)
    num_blocks = kv_cache.shape[2]
    metadata = AttentionMetadata(
        query_lens=(num_tokens,),
        seq_lens=(num_tokens,),
        num_decodes=0,
        first_blocks=(0,),
        block_table=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        slot_mapping=positions,
        seq_lens_device=torch.tensor([num_tokens], dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
    )
    hidden = model.embed(torch.zeros_like(positions))
    model.shard.broadcast(hidden)
    logits = model.compute_logits(model(hidden, positions, kv_cache, metadata)[: len(members)])
    if model.shard.rank == 0:
        sampler.sample(logits, members).result()


def _largest_runs(args: EngineArgs) -> Iterator[list[Samples]]:
    """As many mel frames as one run can have: in long clips, and in one clip for each token of a step."""
    frames = max(args.max_encoder_frames, MAX_MEL_FRAMES)
    yield [np.zeros(MAX_AUDIO_SAMPLES, dtype=np.float32)] * (frames // MAX_MEL_FRAMES)
    num_clips = min(_token_budget(args), frames)
    yield [np.zeros(frames // num_clips * HOP_LENGTH, dtype=np.float32)] * num_clips


def _dearest_rows(args: EngineArgs) -> list[SampleRow]:
    """As many as a step can have, of parameters that take all there is of the sampler's work space."""
    params = SamplingParams(
        max_tokens=1, top_k=MAX_PARTIAL + 1, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=20
    )
    sequences = [Sequence(EngineRequest(str(row), (0,), params), seed=row) for row in range(args.max_num_seqs)]
    drafts = range(1 + args.num_speculative_tokens)
    return [SampleRow(sequence, (0,) * num_drafts) for sequence in sequences for num_drafts in drafts]


def _token_budget(args: EngineArgs) -> int:
    assert args.max_num_batched_tokens is not None, "it is resolved when the device is known"
    return args.max_num_batched_tokens
