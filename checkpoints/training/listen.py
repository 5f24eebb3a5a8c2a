"""Greedy answers of a network in training, and word error rates, for a quick look every few hundred steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoints.training.augment import log_mel, telephone
from checkpoints.training.batches import CTC_CHARACTERS, ClipStore
from checkpoints.training.network import Network
from checkpoints.training.prompts import PromptRenderer

QUICK_CLIPS = 60
ASK = ({"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What does the person say?"}]},)


def word_errors(reference: str, hypothesis: str) -> int:
    """The least number of words to insert, delete or replace."""
    want, got = reference.split(), hypothesis.split()
    row = list(range(len(got) + 1))
    for i, word in enumerate(want, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(got, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    errors = sum(word_errors(r, h) for r, h in zip(references, hypotheses, strict=True))
    return errors / max(1, sum(len(r.split()) for r in references))


def read_characters(log_probs: Tensor) -> list[str]:
    """Best-path CTC decoding of [E, B, classes]."""
    texts = []
    for path in log_probs.argmax(-1).T.tolist():
        kept = [c for c, before in zip(path, [0, *path], strict=False) if c and c != before]
        texts.append("".join(CTC_CHARACTERS[c - 1] for c in kept).strip())
    return texts


@torch.no_grad()
def answer(network: Network, renderer: PromptRenderer, audio: Tensor, max_new: int = 20) -> list[str]:
    """Greedy answers to `ASK` about clips whose projected rows are [B, A, C]."""
    ids = [t for part in _pieces(renderer, audio.shape[1]) for t in part]
    token_ids = torch.tensor([ids] * len(audio))
    is_audio = token_ids == renderer.audio_id
    done = torch.zeros(len(audio), dtype=torch.bool)
    new: list[Tensor] = []
    for _ in range(max_new):
        x = network.embed(token_ids, is_audio, audio.flatten(0, 1))
        last = (torch.arange(len(audio)), torch.full((len(audio),), x.shape[1] - 1))
        best = network.logits(network.language_model.model(x, last)).argmax(-1)
        best = torch.where(done, renderer.end_id, best)
        done |= best == renderer.end_id
        new.append(best)
        if bool(done.all()):
            break
        token_ids = torch.cat([token_ids, best[:, None]], dim=1)
        is_audio = torch.cat([is_audio, torch.zeros(len(audio), 1, dtype=torch.bool)], dim=1)
    rows = torch.stack(new, dim=1).tolist()
    return [renderer.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def _pieces(renderer: PromptRenderer, num_audio: int) -> list[list[int]]:
    ids = renderer.encode(renderer.prompt(list(ASK)))
    return [[t] * num_audio if t == renderer.audio_id else [t] for t in ids]


@torch.no_grad()
def score_quickly(network: Network, renderer: PromptRenderer, cache: Path, joint: bool) -> dict[str, float]:
    """Word error rates of up to `QUICK_CLIPS` clips of each evaluation set, characters and answers."""
    rates: dict[str, float] = {}
    for name, band in (("held_out", False), ("held_out", True), ("unseen", False)):
        if not (cache / f"{name}.jsonl").exists():
            continue
        store = ClipStore(cache, [name])
        picks = np.linspace(0, len(store) - 1, QUICK_CLIPS).astype(int)
        references, characters, answers = [], [], []
        for chunk in np.array_split(picks, 6):
            clips = [store.pcm(int(i)) for i in chunk]
            pcm = torch.zeros(len(clips), max(c.size for c in clips))
            for row, clip in enumerate(clips):
                pcm[row, : clip.size] = torch.from_numpy(clip)
            pcm = telephone(pcm) if band else pcm
            frames, pooled = network.audio_tower(log_mel(pcm), -(-pcm.shape[1] // 160))
            references += [store.text(int(i)) for i in chunk]
            characters += read_characters(network.ctc_log_probs(frames))
            if joint:
                answers += answer(network, renderer, network.multi_modal_projector.linear(pooled))
        label = name + (" phone" if band else "")
        rates[f"{label} (characters)"] = word_error_rate(references, characters)
        if joint:
            rates[label] = word_error_rate(references, answers)
    return rates
