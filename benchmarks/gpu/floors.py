"""The roofline: bytes and operations of what the model does, and the time below which no code can do it. Torch-
free.

A decode step reads every weight of the decoder once and every key and value of its sequences once; whichever of
the memory and the arithmetic takes longer for the weights counts, and keys and values come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import AudioConfig, Qwen2AudioConfig, TextConfig

BYTES = 2
"""Of a bfloat16."""


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at best."""

    bytes_per_s: float
    flop_per_s: float
    source: str


H200 = Ceilings(4.3e12, 780e12, "an H200: 4.3 TB/s device copy, 780 TFLOP/s bf16")
"""Those that the bar was computed with."""


def kv_bytes_per_token(text: TextConfig, itemsize: int = BYTES) -> int:
    """Keys and values of one token in all layers."""
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * itemsize


def linear_shapes(text: TextConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the decoder's matrices, by name; all but lm_head once for each layer."""
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    return {
        "qkv_proj": (heads * text.head_dim, text.hidden_size),
        "o_proj": (text.hidden_size, text.num_attention_heads * text.head_dim),
        "gate_up_proj": (2 * text.intermediate_size, text.hidden_size),
        "down_proj": (text.hidden_size, text.intermediate_size),
        "lm_head": (text.vocab_size, text.hidden_size),
    }


def decoder_weights(text: TextConfig) -> int:
    """Numbers that a step reads: layers and lm_head."""
    sizes = {name: rows * columns for name, (rows, columns) in linear_shapes(text).items()}
    return sizes.pop("lm_head") + text.num_hidden_layers * sum(sizes.values())


def decode_step_s(
    config: Qwen2AudioConfig,
    batch: int,
    context: float,
    ceilings: Ceilings,
    *,
    weight_bytes: int = BYTES,
    kv_itemsize: int = BYTES,
) -> float:
    """Seconds of one step of `batch` sequences with `context` tokens each. lm_head stays in bfloat16."""
    weights = decoder_weights(config.text)
    head = config.text.vocab_size * config.text.hidden_size
    read = (weights - head) * weight_bytes + head * BYTES
    products = max(read / ceilings.bytes_per_s, 2 * weights * batch / ceilings.flop_per_s)
    return products + batch * context * kv_bytes_per_token(config.text, kv_itemsize) / ceilings.bytes_per_s


def attention_flop(queries: int, keys: int, num_heads: int, head_dim: int, *, causal: bool) -> float:
    """Of scores and sums, bottom-right aligned where causal."""
    pairs = queries * keys - queries * (queries - 1) / 2 if causal else queries * keys
    return 4.0 * pairs * num_heads * head_dim


def encoder_flop(audio: AudioConfig, hidden_size: int, mel_frames: int) -> float:
    """Of one clip, projector included."""
    frames = (mel_frames - 1) // 2 + 1
    width = audio.d_model
    convolutions = 2 * 3 * (mel_frames * audio.num_mel_bins + frames * width) * width
    layer = 2 * frames * (4 * width * width + 2 * width * audio.encoder_ffn_dim) + 4 * frames * frames * width
    return convolutions + audio.encoder_layers * layer + 2 * (frames // 2) * width * hidden_size
