"""What is measured: the full size with the loads of the bar, and a tiny one that tries the same code on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.make_checkpoint import BUNDLED, SIZES
from model.config import Qwen2AudioConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of all loads. `size` is a name of `benchmarks.make_checkpoint`."""

    size: str
    batches: tuple[int, ...]
    context: int
    """Tokens of each sequence while decode steps are measured."""
    steps: int
    """Decode steps of a measurement."""
    prompts: tuple[int, ...]
    """Lengths of whole prompts."""
    clip_seconds: tuple[float, ...]
    clips_at_once: tuple[int, ...]
    requests: int
    """Of an offline run."""
    prompt_clip_seconds: float
    prompt_tokens: int
    """Of an offline or HTTP request, those of its clip included."""
    output_tokens: int
    sequences: tuple[int, ...]
    """How many run at once in an offline run; the best counts."""
    peer_batches: tuple[int, ...]
    idle_requests: int
    rates: tuple[float, ...]
    rate_seconds: float
    gemm_rows: tuple[int, ...]
    square: int
    """Of the product that gives the ceiling of the arithmetic."""
    copy_bytes: int

    @property
    def config(self) -> Qwen2AudioConfig:
        """The checkpoint's shape."""
        sections = SIZES[self.size]
        text = {**sections["text"], "num_key_value_heads": sections["text"]["num_attention_heads"]}
        return Qwen2AudioConfig.from_json(
            {
                "model_type": "qwen2_audio",
                "audio_config": sections["audio"],
                "text_config": {**text, "vocab_size": sections["vocab_size"], "max_position_embeddings": 8192},
                "audio_token_index": Qwen2AudioConfig.from_folder(BUNDLED).audio_token_id,
                "dtype": "bfloat16",
            }
        )


SHAPES = {
    "7b": Shape(
        size="7b",
        batches=(1, 8, 32, 64, 128),
        context=1000,
        steps=48,
        prompts=(512, 2048),
        clip_seconds=(2.0, 5.0, 10.0, 30.0),
        clips_at_once=(1, 4, 8),
        requests=256,
        prompt_clip_seconds=30.0,
        prompt_tokens=800,
        output_tokens=200,
        sequences=(128, 192),
        peer_batches=(8, 16, 32, 64),
        idle_requests=20,
        rates=(4.0, 8.0, 12.0),
        rate_seconds=20.0,
        gemm_rows=(1, 8, 32, 64, 128, 512, 1024, 2048),
        square=8192,
        copy_bytes=4 << 30,
    ),
    "tiny": Shape(
        size="tiny",
        batches=(1, 4),
        context=40,
        steps=4,
        prompts=(32,),
        clip_seconds=(0.5, 1.0),
        clips_at_once=(1, 2),
        requests=4,
        prompt_clip_seconds=1.0,
        prompt_tokens=40,
        output_tokens=4,
        sequences=(2,),
        peer_batches=(1, 2),
        idle_requests=2,
        rates=(20.0,),
        rate_seconds=0.2,
        gemm_rows=(1, 4),
        square=128,
        copy_bytes=1 << 20,
    ),
}
