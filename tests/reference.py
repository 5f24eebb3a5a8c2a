"""A tiny random Qwen2-Audio built by transformers: the reference that our answers are compared with.

`build` saves one with the published tensor names and file set; `Reference` runs it the way a user of
transformers would (processor, generate). Nothing here is used at run time.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)

BUNDLED = Path(__file__).parent.parent / "checkpoints" / "tympan-tiny"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.json",
    "preprocessor_config.json",
)


def build(folder: Path, *, kv_heads: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random checkpoint (4 heads, `kv_heads` of them for keys) under the bundled tokenizer."""
    special = {entry["content"]: entry["id"] for entry in _tokenizer_json()["added_tokens"]}
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 2048,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": special["<|endoftext|>"],
            "eos_token_id": special["<|im_end|>"],
        },
        audio_token_index=special["<|AUDIO|>"],
    )
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config).to(dtype).eval()
    for parameter in model.parameters():  # the default init is so small that every logit is nearly the same
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(BUNDLED / name, folder / name)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "eos_token_id": [special["<|im_end|>"], special["<|endoftext|>"]]})
    )
    return folder


def _tokenizer_json() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((BUNDLED / "tokenizer.json").read_text())
    return content


@dataclass
class Reference:
    """transformers on one checkpoint."""

    model: Qwen2AudioForConditionalGeneration
    processor: Qwen2AudioProcessor

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """Open `folder` in float32."""
        template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
        processor = Qwen2AudioProcessor(
            feature_extractor=WhisperFeatureExtractor.from_pretrained(folder),
            tokenizer=Qwen2Tokenizer.from_pretrained(folder),
            chat_template=template,
        )
        model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        return cls(model, processor)

    def inputs(self, conversation: list[dict[str, Any]], audios: list[np.ndarray]) -> Any:
        """Prompt ids and features of a conversation, by transformers' own template and processor."""
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return self.raw_inputs(text, audios)

    def raw_inputs(self, text: str, audios: list[np.ndarray]) -> Any:
        """Prompt ids and features of a raw prompt."""
        if not audios:
            return self.processor(text=text, return_tensors="pt")
        return self.processor(text=text, audio=audios, return_tensors="pt", sampling_rate=16000)

    @torch.inference_mode()
    def logits(self, inputs: Any) -> torch.Tensor:
        """Prefill logits. -> [T, V]."""
        logits: torch.Tensor = self.model(**inputs).logits[0]
        return logits

    @torch.inference_mode()
    def greedy(self, inputs: Any, num_tokens: int = 32) -> list[int]:
        """Exactly `num_tokens` greedy ids, end of sequence ignored."""
        out = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            repetition_penalty=1.0,
        )
        ids: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
        return ids
