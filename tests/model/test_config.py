"""Reading config.json and generation_config.json, and the audio-token formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2AudioEncoder
from transformers import Qwen2AudioEncoderConfig as EncoderConfig
from transformers.models.qwen2 import Qwen2Config

from model.config import (
    AudioConfig,
    GenerationConfig,
    Qwen2AudioConfig,
    TextConfig,
    num_audio_tokens,
    num_mel_frames,
)
from model.errors import ConfigError

PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen2AudioForConditionalGeneration"],
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "d_model": 1280,
        "activation_function": "gelu",
        "scale_embedding": False,
        "max_source_positions": 1500,
    },
    "audio_token_index": 151646,
    "ignore_index": -100,
    "model_type": "qwen2_audio",
    "text_config": {
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "intermediate_size": 11008,
        "max_position_embeddings": 8192,
        "model_type": "qwen2",
        "rope_theta": 10000,
        "rms_norm_eps": 1e-5,
        "sliding_window": 32768,
        "torch_dtype": "bfloat16",
        "use_mrope": False,
        "vocab_size": 156032,
    },
    "transformers_version": "4.38.1",
    "vocab_size": 156032,
}
"""config.json of the published checkpoints."""


def published(**changes: Any) -> dict[str, Any]:
    """The published file with entries changed; `text_config__x` reaches inside."""
    raw: dict[str, Any] = json.loads(json.dumps(PUBLISHED))
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = raw
        for parent in parents:
            target = target[parent]
        target[name] = value
    return raw


def test_what_the_published_file_leaves_out_has_transformers_defaults() -> None:
    config = Qwen2AudioConfig.from_json(PUBLISHED)
    assert config.text == TextConfig(
        vocab_size=156032,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    assert config.audio == AudioConfig()
    assert (config.audio_token_id, config.dtype) == (151646, "bfloat16")


def test_our_defaults_are_those_of_transformers() -> None:
    ours, theirs = TextConfig(), Qwen2Config()
    for name in TextConfig.__slots__:
        if name not in ("head_dim", "rope_theta"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    for name in AudioConfig.__slots__:
        assert getattr(AudioConfig(), name) == getattr(EncoderConfig(), name), name


def test_a_shrunken_audio_config_means_the_published_encoder() -> None:
    raw = published(audio_config={"model_type": "qwen2_audio_encoder"})
    assert Qwen2AudioConfig.from_json(raw) == Qwen2AudioConfig.from_json(PUBLISHED)


def test_names_of_transformers_5_are_read() -> None:
    raw = published(dtype="float16", text_config__rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    del raw["text_config"]["torch_dtype"], raw["text_config"]["rope_theta"]
    config = Qwen2AudioConfig.from_json(raw)
    assert (config.dtype, config.text.rope_theta) == ("float16", 1e6)


def test_grouped_heads_and_their_width_are_derived() -> None:
    raw = published(text_config__hidden_size=1536, text_config__num_attention_heads=12)
    raw["text_config"]["num_key_value_heads"] = 2
    text = Qwen2AudioConfig.from_json(raw).text
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (12, 2, 128)


@pytest.mark.parametrize("place", ["tie_word_embeddings", "text_config__tie_word_embeddings"])
def test_tied_embeddings_are_read_from_either_level(place: str) -> None:
    assert Qwen2AudioConfig.from_json(published(**{place: True})).text.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "value", "named"),
    [
        ("model_type", "qwen2", "qwen2_audio"),
        ("audio_config__activation_function", "relu", "activation_function"),
        ("audio_config__max_source_positions", 1000, "max_source_positions"),
        ("audio_config__encoder_attention_heads", 7, "d_model"),
        ("text_config__hidden_act", "gelu", "hidden_act"),
        ("text_config__num_key_value_heads", 5, "num_key_value_heads"),
        ("text_config__use_sliding_window", True, "use_sliding_window"),
        ("text_config__rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_scaling"),
        ("text_config__rope_scaling", {"type": "linear", "factor": 4.0}, "rope_scaling"),
        ("text_config__rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "rope_scaling"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(change: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Qwen2AudioConfig.from_json(published(**{change: value}))


def test_null_entries_mean_the_default() -> None:
    raw = published(
        text_config__rope_scaling=None, text_config__num_key_value_heads=None, audio_config__d_model=None
    )
    assert Qwen2AudioConfig.from_json(raw) == Qwen2AudioConfig.from_json(PUBLISHED)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_malformed_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        Qwen2AudioConfig.from_folder(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        Qwen2AudioConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, GenerationConfig()),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.5, "repetition_penalty": 1.1,
             "eos_token_id": [7, 8]},
            GenerationConfig((7, 8), 0.7, 20, 0.5, 1.1),
        ),
        ({"do_sample": False, "temperature": 0.7, "top_k": 20, "eos_token_id": 7}, GenerationConfig((7,), 0.0)),
        ({"do_sample": True, "temperature": None, "top_k": None}, GenerationConfig()),
    ],
)  # fmt: skip
def test_generation_config(tmp_path: Path, content: dict[str, Any] | None, expected: GenerationConfig) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert GenerationConfig.from_folder(tmp_path) == expected


def test_audio_token_count_is_that_of_transformers() -> None:
    with torch.device("meta"):
        tower = Qwen2AudioEncoder(EncoderConfig(encoder_layers=0))
    lengths = [*range(1, 2001), *range(2001, 480_000, 997), *range(479_990, 480_001)]
    frames = torch.tensor([-(-length // 160) for length in lengths])
    _, theirs = tower._get_feat_extract_output_lengths(frames)
    assert [num_audio_tokens(length) for length in lengths] == theirs.tolist()


def test_audio_token_count_at_the_edges() -> None:
    counts = {0: 0, 320: 0, 321: 1, 960: 1, 961: 2, 1600: 2, 1601: 3, 16_000: 25, 480_000: 750}
    assert {length: num_audio_tokens(length) for length in counts} == counts
    assert num_audio_tokens(-5) == 0
    assert [num_mel_frames(length) for length in (0, 1, 160, 161, 480_000)] == [0, 1, 1, 2, 3000]


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("text_config", "hidden_size", "4096"),
        ("text_config", "num_attention_heads", 1.5),
        ("audio_config", "d_model", [1]),
        ("text_config", "rms_norm_eps", "small"),
        ("text_config", "num_hidden_layers", True),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_by_name(section: str, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{section}.{name}"):
        Qwen2AudioConfig.from_json({"model_type": "qwen2_audio", section: {name: value}})


def test_a_mel_frame_costs_what_its_weights_do() -> None:
    """The published shape: 629 M weights in the encoder's layers, 6.477 G in the decoder's."""
    assert Qwen2AudioConfig(text=TextConfig(intermediate_size=11008)).frame_cost == pytest.approx(
        0.629 / 2 / 6.477, rel=1e-3
    )
