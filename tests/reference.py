"""A tiny random Qwen2-Audio built by transformers: the reference that our answers are compared with.

`build` saves one with the published tensor names and file set. `Reference` runs it as a user of transformers would:
`inputs` and `raw_inputs` go through transformers' own template and processor, `prompt_inputs` takes token ids and
clips as the engine does. Nothing here is used at run time.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)

from engine.messages import AudioClip, EngineRequest, SamplingParams
from model.config import num_audio_tokens

Samples = NDArray[np.float32]

BUNDLED = Path(__file__).parent.parent / "checkpoints" / "tympan-tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.json")
PREPROCESSOR = {
    "chunk_length": 30,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "processor_class": "Qwen2AudioProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
}
"""preprocessor_config.json as published."""


def build(
    folder: Path,
    *,
    kv_heads: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Save a random checkpoint (4 heads, `kv_heads` of them for keys) under the bundled tokenizer."""
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(_config(kv_heads, tied)).to(dtype).eval()
    for parameter in model.parameters():  # the default init is so small that every logit is nearly the same
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for name in TOKENIZER_FILES:
        shutil.copy(BUNDLED / name, folder / name)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    eos = [special_id("<|im_end|>"), special_id("<|endoftext|>")]
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": eos}))
    return folder


def special_id(content: str) -> int:
    """Id of a special token of the bundled tokenizer."""
    added = json.loads((BUNDLED / "tokenizer.json").read_text())["added_tokens"]
    return next(entry["id"] for entry in added if entry["content"] == content)


def noise(num_samples: int, seed: int = 0) -> Samples:
    """A clip of noise under a slow swell, so that its frames differ."""
    rng = np.random.default_rng(seed)
    swell = 0.05 + 0.1 * np.abs(np.sin(np.linspace(0.0, 7.0, num_samples)))
    return (rng.standard_normal(num_samples) * swell).astype(np.float32)


@dataclass(frozen=True)
class Prompt:
    """Token ids with each audio placeholder expanded, and the clips that fill them."""

    token_ids: tuple[int, ...]
    clips: tuple[AudioClip, ...]

    @classmethod
    def of(cls, *parts: int | Samples, audio_token_id: int | None = None) -> Prompt:
        """Text token ids and clips, in order."""
        placeholder = special_id("<|AUDIO|>") if audio_token_id is None else audio_token_id
        token_ids: list[int] = []
        clips: list[AudioClip] = []
        for part in parts:
            if isinstance(part, int):
                token_ids.append(part)
                continue
            num_tokens = num_audio_tokens(len(part))
            content_hash = f"{len(part)}-{hash(part.tobytes()):x}"
            clips.append(AudioClip(part, content_hash, len(token_ids), num_tokens))
            token_ids += [placeholder] * num_tokens
        return cls(tuple(token_ids), tuple(clips))

    def request(self, request_id: str = "r", **sampling: Any) -> EngineRequest:
        """For the engine. Greedy and 32 tokens unless told otherwise."""
        params = SamplingParams(**{"max_tokens": 32, "temperature": 0.0, **sampling})
        return EngineRequest(request_id, self.token_ids, params, self.clips)


@dataclass
class Reference:
    """transformers on one checkpoint."""

    folder: Path
    model: Qwen2AudioForConditionalGeneration
    feature_extractor: WhisperFeatureExtractor

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """Open `folder` in float32."""
        model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        return cls(folder, model, WhisperFeatureExtractor.from_pretrained(folder))

    @cached_property
    def processor(self) -> Qwen2AudioProcessor:
        """Template, tokenizer and feature extractor in one."""
        template = json.loads((self.folder / "chat_template.json").read_text())["chat_template"]
        return Qwen2AudioProcessor(
            feature_extractor=self.feature_extractor,
            tokenizer=Qwen2Tokenizer.from_pretrained(self.folder),
            chat_template=template,
        )

    def inputs(self, conversation: list[dict[str, Any]], audios: list[Samples]) -> Any:
        """Prompt ids and features of a conversation, by transformers' own template and processor."""
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return self.raw_inputs(text, audios)

    def raw_inputs(self, text: str, audios: list[Samples]) -> Any:
        """Prompt ids and features of a raw prompt."""
        if not audios:
            return self.processor(text=text, return_tensors="pt")
        return self.processor(text=text, audio=audios, return_tensors="pt", sampling_rate=16000)

    def prompt_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """The same for a prompt that is token ids already."""
        input_ids = torch.tensor([prompt.token_ids])
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if prompt.clips:
            inputs |= self.features([clip.samples for clip in prompt.clips])
        return inputs

    def features(self, clips: list[Samples]) -> dict[str, torch.Tensor]:
        """Padded log-mel features and their mask, by transformers."""
        features = self.feature_extractor(
            clips, sampling_rate=16000, return_attention_mask=True, return_tensors="pt", padding="max_length"
        )
        return {
            "input_features": features["input_features"],
            "feature_attention_mask": features["attention_mask"],
        }

    @torch.inference_mode()
    def encode(self, clip: Samples) -> torch.Tensor:
        """One clip through the tower and the projector. -> [A, C]."""
        features = self.features([clip])
        num_frames = int(features["feature_attention_mask"].sum())
        num_conv_frames = (num_frames - 1) // 2 + 1
        window = self.model.config.audio_config.max_source_positions
        mask = torch.zeros(1, 1, window, window)
        mask[..., num_conv_frames:] = float("-inf")
        tower = self.model.model.audio_tower(features["input_features"], attention_mask=mask)
        rows: torch.Tensor = self.model.model.multi_modal_projector(tower.last_hidden_state)[0]
        return rows[: num_conv_frames // 2]

    @torch.inference_mode()
    def logits(self, inputs: Any) -> torch.Tensor:
        """Prefill logits. -> [T, V]."""
        logits: torch.Tensor = self.model(**inputs).logits[0]
        return logits

    @torch.inference_mode()
    def greedy(self, inputs: Any, num_tokens: int = 32) -> list[int]:
        """Exactly `num_tokens` greedy ids, none of them an end of sequence."""
        out = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            repetition_penalty=1.0,
        )
        ids: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
        return ids


def _config(kv_heads: int, tied: bool) -> Qwen2AudioConfig:
    audio = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128}
    text = {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": special_id("<|endoftext|>"),
        "eos_token_id": special_id("<|im_end|>"),
        "tie_word_embeddings": tied,
    }
    return Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **audio},
        text_config={"model_type": "qwen2", **text},
        audio_token_index=special_id("<|AUDIO|>"),
        tie_word_embeddings=tied,
    )
