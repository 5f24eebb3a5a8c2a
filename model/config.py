"""The shape of a Qwen2-Audio checkpoint, and the only home of the audio-token formula. Torch-free.

A published config.json is sparse: what it leaves out has the default that transformers gives it
(`configuration_qwen2.py`, `configuration_qwen2_audio.py`). Those defaults are written out here and owned by
us, so that an update of another library never changes what a checkpoint means. Files saved by transformers 5
(`dtype`, `rope_parameters`) and before (`torch_dtype`, `rope_theta`) are both read. What we cannot honour
(another activation, scaled RoPE, a sliding window that is in use) is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from model.errors import ConfigError
from model.quantization.scheme import QuantizationScheme, parse_quantization

SAMPLE_RATE = 16_000
"""Hz. The feature extractor's only rate."""
HOP_LENGTH = 160
"""Samples from one mel frame to the next: 10 ms."""
MAX_AUDIO_SECONDS = 30
"""The window that the encoder was trained on."""
MAX_AUDIO_SAMPLES = MAX_AUDIO_SECONDS * SAMPLE_RATE
MAX_MEL_FRAMES = MAX_AUDIO_SAMPLES // HOP_LENGTH

Json = Mapping[str, Any]


def num_mel_frames(num_samples: int) -> int:
    """F: mel frames that hold audio of a clip of `num_samples` (at 16 kHz, at most 30 s)."""
    return -(-num_samples // HOP_LENGTH)


def num_conv_frames(mel_frames: int) -> int:
    """C: frames behind the encoder's stride-2 convolution, 20 ms each."""
    return (mel_frames - 1) // 2 + 1


def num_audio_tokens(num_samples: int) -> int:
    """N: positions that a clip takes in the prompt: 25 a second, 750 for 30 s, 0 for 320 samples or fewer.

    Source: `_get_feat_extract_output_lengths` in modeling_qwen2_audio.py.
    """
    if num_samples <= 0:
        return 0
    return num_conv_frames(num_mel_frames(num_samples)) // 2


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """The encoder: Whisper-large-v3's shape unless the file says otherwise."""

    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    d_model: int = 1280
    max_source_positions: int = 1500
    activation_function: str = "gelu"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.encoder_attention_heads

    def __post_init__(self) -> None:
        _require(self.activation_function == "gelu", "audio_config.activation_function", "gelu")
        _require(self.d_model % self.encoder_attention_heads == 0, "audio_config.d_model", "a multiple of heads")
        _require(
            2 * self.max_source_positions == MAX_MEL_FRAMES,
            "audio_config.max_source_positions",
            f"{MAX_MEL_FRAMES // 2}",
        )


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The decoder: Qwen2 with the defaults of transformers' Qwen2Config (multi-head, not grouped)."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        _require(self.hidden_act == "silu", "text_config.hidden_act", "silu")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "text_config.num_attention_heads",
            "a multiple of num_key_value_heads",
        )


@dataclass(frozen=True, slots=True)
class Qwen2AudioConfig:
    """A whole checkpoint's shape. `dtype` is the name of the stored precision ("bfloat16", ...)."""

    audio: AudioConfig = field(default_factory=AudioConfig)
    text: TextConfig = field(default_factory=TextConfig)
    audio_token_id: int = 151646
    dtype: str = "bfloat16"
    quantization: QuantizationScheme | None = None

    @property
    def frame_cost(self) -> float:
        """Tokens that the decoder computes in the time in which the encoder computes a mel frame.

        By the weights of the layers that each of them meets; behind its convolutions the encoder has half as many
        frames.
        """
        audio, text = self.audio, self.text
        encoder = audio.encoder_layers * audio.d_model * (4 * audio.d_model + 2 * audio.encoder_ffn_dim)
        width = text.head_dim * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
        decoder = text.num_hidden_layers * text.hidden_size * (width + 3 * text.intermediate_size)
        return encoder / 2 / decoder

    @classmethod
    def from_json(cls, raw: Json) -> Qwen2AudioConfig:
        """Read the content of config.json.

        Raises ConfigError when it is not a Qwen2-Audio or holds something we cannot honour.
        """
        model_type = raw.get("model_type")
        if model_type != "qwen2_audio":
            raise ConfigError(f"model_type is {model_type!r}; this server runs qwen2_audio checkpoints only")
        text = raw.get("text_config") or {}
        dtype = raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
        return cls(
            audio=_audio_config(raw.get("audio_config") or {}),
            text=_text_config(text, tied=bool(raw.get("tie_word_embeddings", False))),
            audio_token_id=raw.get("audio_token_index", raw.get("audio_token_id", 151646)),
            dtype=dtype or "float32",
            quantization=parse_quantization(raw.get("quantization_config") or text.get("quantization_config")),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Qwen2AudioConfig:
        """Read `folder`/config.json. Raises ConfigError."""
        return cls.from_json(read_json(folder / "config.json"))


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Sampling defaults that the checkpoint's authors chose (generation_config.json)."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationConfig:
        """Read `folder`/generation_config.json; without one, the neutral defaults. Raises ConfigError.

        As in transformers, values beside `do_sample: false` do not count: the default is greedy then.
        """
        path = folder / "generation_config.json"
        raw = read_json(path) if path.exists() else {}
        eos = raw.get("eos_token_id", [])
        sampling = bool(raw.get("do_sample", False))
        return cls(
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
            temperature=_or(raw, "temperature", 1.0) if sampling else (0.0 if "do_sample" in raw else 1.0),
            top_k=_or(raw, "top_k", 0) if sampling else 0,
            top_p=_or(raw, "top_p", 1.0) if sampling else 1.0,
            repetition_penalty=_or(raw, "repetition_penalty", 1.0),
        )


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object of a checkpoint. Raises ConfigError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.name} is missing from {path.parent}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return content


def _given(raw: Json, shape: type[AudioConfig] | type[TextConfig], section: str) -> dict[str, Any]:
    """The fields of a section that the file sets, each of the type of its default. Raises ConfigError."""
    given = {item.name: raw[item.name] for item in fields(shape) if raw.get(item.name) is not None}
    for item in fields(shape):
        wanted = (int, float) if isinstance(item.default, float) else type(item.default)
        if item.name in given and (
            not isinstance(given[item.name], wanted) or isinstance(given[item.name], bool) != (wanted is bool)
        ):
            _require(False, f"{section}.{item.name}", f"of the type of its default, {item.default!r}")
    return given


def _audio_config(raw: Json) -> AudioConfig:
    return AudioConfig(**_given(raw, AudioConfig, "audio_config"))


def _text_config(raw: Json, *, tied: bool) -> TextConfig:
    given = _given(raw, TextConfig, "text_config")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))  # "type" before transformers 4.45
    _require(rope_type == "default", "text_config.rope_scaling", "absent")
    _require(not raw.get("use_sliding_window", False), "text_config.use_sliding_window", "false")
    given.setdefault("head_dim", given.get("hidden_size", 4096) // given.get("num_attention_heads", 32))
    given["rope_theta"] = float(_or(rope, "rope_theta", _or(raw, "rope_theta", 10000.0)))
    given["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings", tied)) or tied
    return TextConfig(**given)


def _or(raw: Json, name: str, default: Any) -> Any:
    value = raw.get(name)
    return default if value is None else value


def _require(holds: bool, name: str, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"config.json: {name} must be {wanted}; this server cannot honour another value")
