"""What the operator sees once the server is ready: what runs where and why, how much fits, a request to paste."""

from __future__ import annotations

import json
import shlex

from engine.messages import EngineInfo
from model.config import MAX_AUDIO_SAMPLES, num_audio_tokens

TYPICAL_TEXT_TOKENS = 50
"""Question and answer round one clip of 30 s, for the estimate of how many fit."""


def startup_summary(info: EngineInfo, model: str, address: str, *, has_keys: bool = False) -> str:
    """One screen of text. has_keys: requests need one, which the request to paste takes from the environment."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    headers = ["-H 'Content-Type: application/json'"]
    if has_keys:
        headers.append('-H "Authorization: Bearer $OPENAI_API_KEY"')
    return "\n".join(
        (
            f"Tympan serves {model} on {address}",
            f"  device     {info.device}",
            f"  dtype      {info.dtype} ({info.dtype_reason})",
            f"  attention  {info.attention_backend} ({info.attention_reason})",
            *((f"  graphs     {info.cuda_graphs}",) if info.cuda_graphs else ()),
            f"  KV cache   {info.num_blocks} blocks of {info.block_size} tokens in {info.kv_cache_dtype}: "
            f"{num_concurrent_requests(info)} requests at once with a 30 s clip each",
            f"  steps      of at most {info.max_num_batched_tokens} tokens ({info.max_num_batched_tokens_reason})",
            f"  context    {info.max_model_len} tokens; loaded in {info.load_seconds:.1f} s",
            "Try it:",
            f"  curl {address}/v1/chat/completions {' '.join(headers)} -d {shlex.quote(body)}",
        )
    )


def num_concurrent_requests(info: EngineInfo) -> int:
    """How many requests with a clip of 30 s run at once."""
    tokens_per_request = num_audio_tokens(MAX_AUDIO_SAMPLES) + TYPICAL_TEXT_TOKENS
    blocks_per_request = -(-tokens_per_request // info.block_size)
    return min(info.num_blocks // blocks_per_request, info.max_num_seqs)
