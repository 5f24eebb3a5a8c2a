"""Greedy answers of an exported checkpoint, one conversation at a time, through the server's own `model/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.training.prompts import PromptRenderer
from model.attention.base import AttentionMetadata
from model.attention.reference import ReferenceBackend
from model.config import GenerationConfig, Qwen2AudioConfig
from model.loader import load_model

MAX_TOKENS = 2048
BLOCK = 16


class Answerer:
    """A loaded checkpoint folder that answers conversations about clips."""

    def __init__(self, folder: Path) -> None:
        self.config = Qwen2AudioConfig.from_folder(folder)
        self.renderer = PromptRenderer(folder)
        self.stop_ids = set(GenerationConfig.from_folder(folder).eos_token_ids)
        backend, device = ReferenceBackend(), torch.device("cpu")
        self.model = load_model(folder, self.config, backend, torch.float32, device)
        text = self.config.text
        shape = (text.num_hidden_layers, 2, MAX_TOKENS // BLOCK, BLOCK, text.num_key_value_heads, text.head_dim)
        self._kv = torch.zeros(shape)
        self._blocks = torch.arange(MAX_TOKENS // BLOCK, dtype=torch.int32)[None]

    def chat(self, messages: Sequence[dict[str, Any]], clips: Sequence[np.ndarray] = ()) -> str:
        """The answer to chat messages whose audio parts are `clips`, in order."""
        return self.complete(self.renderer.prompt(list(messages)), clips)

    @torch.inference_mode()
    def complete(self, prompt: str, clips: Sequence[np.ndarray] = (), max_new: int = 40) -> str:
        """The continuation of a rendered prompt."""
        encoded = list(self.model.encode_audio([torch.from_numpy(c) for c in clips])) if clips else []
        ids = self._expand(self.renderer.encode(prompt), [len(rows) for rows in encoded])
        token_ids = torch.tensor(ids)
        hidden = self.model.embed(token_ids)
        if encoded:
            hidden[token_ids == self.renderer.audio_id] = torch.cat(encoded)
        answer: list[int] = []
        length = len(ids)
        logits = self._step(hidden, 0, length)
        while len(answer) < max_new and (best := int(logits.argmax())) not in self.stop_ids:
            answer.append(best)
            logits = self._step(self.model.embed(torch.tensor([best])), length, length + 1)
            length += 1
        return str(self.renderer.tokenizer.decode(answer, skip_special_tokens=True))

    def _expand(self, ids: list[int], lengths: list[int]) -> list[int]:
        remaining = iter(lengths)
        return [t for token in ids for t in [token] * (next(remaining) if token == self.renderer.audio_id else 1)]

    def _step(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Logits [V] behind the last of positions start..stop, whose embeddings are `hidden` [T, C]."""
        positions = torch.arange(start, stop, dtype=torch.int32)
        metadata = AttentionMetadata(
            query_lens=(stop - start,),
            seq_lens=(stop,),
            num_decodes=int(stop - start == 1),
            first_blocks=(0,),
            block_table=self._blocks,
            slot_mapping=positions,
            seq_lens_device=torch.tensor([stop], dtype=torch.int32),
            query_starts=torch.tensor([0, stop - start], dtype=torch.int32),
        )
        return self.model.compute_logits(self.model(hidden, positions, self._kv, metadata)[-1:])[0]
