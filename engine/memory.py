"""How many KV blocks fit: on CUDA what the worst step leaves when it is run once, on a CPU a fixed budget.

Of several ranks each has its heads' part of a block, and all have as many blocks as fit on the fullest.
"""

from __future__ import annotations

import torch

from engine.errors import EngineStartError
from engine.messages import EngineArgs
from model.attention import AttentionMetadata
from model.config import MAX_AUDIO_SAMPLES, MAX_MEL_FRAMES
from model.kv_cache import allocate_kv_cache, bytes_per_block
from model.qwen2_audio import Qwen2Audio

CPU_KV_BYTES = 2 << 30
"""Default budget on a CPU. Pages are touched only when they are first used."""


CPU_KEPT_BYTES = 128 << 20
"""Of the KV cache, on a CPU: what nobody uses is kept up to here, or one whole context if that is more, rather than
until all pages have been touched."""


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
    fitting = _budget(args, model, block_size) // block_bytes
    num_blocks = min(most, model.shard.minimum(fitting, model.device))
    if num_blocks < per_sequence:
        raise EngineStartError(
            f"the KV cache holds {max(0, num_blocks) * block_size} tokens, --max-model-len is {max_model_len}: "
            "lower that, or give the cache more by --kv-cache-memory-bytes or --gpu-memory-utilization"
        )
    return num_blocks + 1


def _budget(args: EngineArgs, model: Qwen2Audio, block_size: int) -> int:
    """Bytes for the KV cache. On CUDA: what weights, the largest step and the encoder cache leave."""
    if args.kv_cache_memory_bytes is not None:
        return args.kv_cache_memory_bytes
    device = model.device
    if device.type != "cuda":
        return CPU_KV_BYTES // model.shard.size
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    _run_largest_step(args, model, block_size)
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    elsewhere = total - free - torch.cuda.memory_reserved(device)
    needed = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    return int(total * args.gpu_memory_utilization) - elsewhere - needed - args.encoder_cache_bytes


@torch.inference_mode()
def _run_largest_step(args: EngineArgs, model: Qwen2Audio, block_size: int) -> None:
    """The encoder's largest run, then a sequence that fills the token budget, then all logits that may be needed."""
    device = model.device
    if model.shard.rank == 0:
        num_clips = max(1, args.max_encoder_frames // MAX_MEL_FRAMES)
        model.encode_audio([torch.zeros(MAX_AUDIO_SAMPLES, device=device)] * num_clips)
    num_tokens = args.max_num_batched_tokens
    assert num_tokens is not None, "it is resolved when the device is known"
    num_blocks = -(-num_tokens // block_size)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=device)
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
    kv_cache = allocate_kv_cache(model.config.text, num_blocks, block_size, model.kv_cache_dtype, device)
    hidden = model(model.embed(torch.zeros_like(positions)), positions, kv_cache, metadata)
    num_rows = args.max_num_seqs * (1 + args.num_speculative_tokens)
    model.compute_logits(hidden[:1].expand(min(num_rows, num_tokens), -1)).softmax(-1)
