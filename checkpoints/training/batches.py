"""Training batches: clips of one length, augmented, and the conversations about them.

A batch holds two groups of clips; within a group all rows have the same number of samples, so that nothing
needs a mask. Shorter clips are placed at random between silence, longer rows are filled with several words.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoints.training.augment import augment, log_mel
from checkpoints.training.prompts import Conversation, Heard, PromptRenderer, converse
from checkpoints.training.sounds import SOUNDS, make_sound
from checkpoints.training.vocabulary import arithmetic_answer

RATE = 16_000
SUMS = 0.2  # the share of clips that are made a spoken sum
PAIRS = 0.5  # the share of clips that are talked about together with another
CTC_CHARACTERS = " abcdefghijklmnopqrstuvwxyz"  # class 0 is the blank


class ClipStore:
    """The clips of one or more synthesised sets, sorted by length."""

    def __init__(self, cache: Path, names: list[str]) -> None:
        self._samples: list[np.ndarray] = []
        rows: list[tuple[int, int, int, str, str]] = []  # length, set, offset, text, voice
        for number, name in enumerate(names):
            self._samples.append(np.memmap(cache / f"{name}.pcm", dtype="<i2", mode="r"))
            for line in (cache / f"{name}.jsonl").read_text().splitlines():
                row = json.loads(line)
                rows.append((row["length"], number, row["offset"], row["text"], row["voice"]))
        self.rows = sorted(rows)
        self.lengths = np.array([row[0] for row in self.rows])
        self.by_voice: dict[str, list[int]] = {}
        for index, row in enumerate(self.rows):
            if " " not in row[3]:
                self.by_voice.setdefault(row[4].split("+")[0], []).append(index)
        self.voices = list(self.by_voice)
        self.sums = np.array([i for i, row in enumerate(self.rows) if arithmetic_answer(row[3]) is not None])

    def __len__(self) -> int:
        return len(self.rows)

    def pcm(self, index: int) -> np.ndarray:
        length, number, offset, _, _ = self.rows[index]
        return self._samples[number][offset : offset + length].astype(np.float32) / 32767

    def text(self, index: int) -> str:
        return self.rows[index][3]

    def voice(self, index: int) -> str:
        return self.rows[index][4]


@dataclass
class ClipGroup:
    """Log-mel frames [B, 128, F + 2] of equal-length clips, and what each holds."""

    mel: Tensor
    num_frames: int
    heard: list[Heard]
    ctc_targets: Tensor
    ctc_lengths: Tensor

    @property
    def num_tokens(self) -> int:
        return (-(-self.num_frames // 2)) // 2


@dataclass
class Rows:
    """Conversations of about the same length, as ids padded on the right."""

    token_ids: Tensor  # [B, S]
    is_audio: Tensor  # [B, S]
    clips: list[int]  # the clip behind each run of placeholders, over all groups, in row order
    answer_rows: Tensor  # where a next token is learnt, and which one
    answer_columns: Tensor
    answer_ids: Tensor


@dataclass
class Batch:
    """Two clip groups and the conversations about their clips."""

    groups: list[ClipGroup]
    parts: list[Rows]
    is_id: int  # the token " is"


@dataclass
class Row:
    """One conversation, placeholders expanded: the clips in it, its ids, and which of them are learnt."""

    clips: list[int]
    ids: list[int]
    learnt: list[bool]


class BatchMaker:
    """An endless supply of batches; `easy` in [0, 1] favours short clips."""

    def __init__(self, store: ClipStore, renderer: PromptRenderer | None, seed: int) -> None:
        self.store, self.renderer = store, renderer
        self._random = random.Random(seed)
        self._numpy = np.random.default_rng(seed)

    def group(self, seconds: float, sounds: float, easy: float) -> ClipGroup:
        """A group of clips that together last about `seconds`; none is augmented in some groups."""
        length = self._draw_length(easy)
        count = int(np.clip(seconds * RATE / length, 4, 40))
        nearest = int(np.searchsorted(self.store.lengths, length, side="right"))
        lowest = int(np.searchsorted(self.store.lengths, 0.72 * length))
        pcm, heard, quiet = np.zeros((count, length), np.float32), [], []
        for row in range(count):
            kind = self._random.choice(list(SOUNDS)) if self._random.random() < sounds else ""
            if kind:
                pcm[row] = self._sound(kind, length)
                heard.append(Heard(sound=kind))
            elif nearest - lowest < 200 or (length > 1.1 * RATE and self._random.random() < 0.3):
                heard.append(Heard(text=self._several(pcm[row])))
            else:
                index = self._random.randrange(lowest, nearest)
                if self._random.random() < SUMS:
                    index = self._sum_between(lowest, nearest, index)
                self._place(pcm[row], self._stretch(self.store.pcm(index)))
                heard.append(Heard(text=self.store.text(index)))
            quiet.append(kind == "silence")
        wet = torch.from_numpy(pcm)
        is_clean = self._random.random() < 0.12 + 0.6 * easy
        wet = wet if is_clean else augment(wet, torch.tensor(quiet), self._numpy)
        targets = [[CTC_CHARACTERS.index(c) + 1 for c in clip.text] for clip in heard]
        return ClipGroup(
            mel=self._mask(log_mel(wet), [bool(clip.text) and not is_clean for clip in heard]),
            num_frames=-(-length // 160),
            heard=heard,
            ctc_targets=torch.tensor([c for target in targets for c in target], dtype=torch.long),
            ctc_lengths=torch.tensor([len(target) for target in targets]),
        )

    def _sum_between(self, lowest: int, nearest: int, otherwise: int) -> int:
        """A sum among the clips of these lengths; each is a fact to learn, so that they come more often."""
        first, last = np.searchsorted(self.store.sums, [lowest, nearest])
        return int(self.store.sums[self._random.randrange(first, last)]) if last > first else otherwise

    def batch(self, seconds: float, easy: float) -> Batch:
        """Conversations about two groups of clips; some rows are about a clip of each."""
        assert self.renderer is not None
        groups = [self.group(seconds / 2, 0.10, easy) for _ in range(2)]
        offset = len(groups[0].heard)
        first = list(range(offset))
        second = list(range(offset, offset + len(groups[1].heard)))
        rows: list[list[int]] = []
        for _ in range(max(1, round(PAIRS * min(len(first), len(second))))):
            pair = [first.pop(), second.pop()]
            rows.append(pair if self._random.random() < 0.5 else pair[::-1])
        rows += [[clip] for clip in first + second]
        if self._random.random() < 0.5:
            rows.append([])
        return self._collate(groups, rows)

    def _collate(self, groups: list[ClipGroup], rows: list[list[int]]) -> Batch:
        assert self.renderer is not None
        heard = groups[0].heard + groups[1].heard
        tokens = [g.num_tokens for g in groups for _ in g.heard]
        expanded = [
            expand(self.renderer, converse([heard[c] for c in clips], self._random), clips, tokens) for clips in rows
        ]
        return Batch(groups, collate(expanded, self.renderer.audio_id), self.renderer.encode(" is")[0])

    def _draw_length(self, easy: float) -> int:
        kind = self._random.random()
        if kind < 0.04 * (1 - easy):
            return int(self._random.uniform(4, 11) * RATE)
        limit = int(len(self.store) * (1 - 0.6 * easy))
        draws = self._random.choice((1, 2, 3, 4)) if self._random.random() > easy else 1
        length = max(self.store.lengths[self._random.randrange(limit)] for _ in range(draws))
        return int(length * self._random.uniform(1.03, 1.25)) + self._random.randrange(0, 3200)

    def _sound(self, kind: str, length: int) -> np.ndarray:
        wave = make_sound(kind, self._numpy, length)
        if kind not in ("silence", "noise") and self._random.random() < 0.3:
            cut = self._random.randrange(0, length // 4)
            wave[length - cut :] = 0
        return wave

    def _several(self, row: np.ndarray) -> str:
        """Fill a row with single words of one voice (sometimes any voice), with pauses between them."""
        one_voice = self.store.by_voice[self._random.choice(self.store.voices)]
        pool = one_voice if self._random.random() < 0.8 else range(len(self.store))
        words: list[str] = []
        position = self._random.randrange(0, 3200)
        most = self._random.randint(2, 7)
        for _ in range(12):
            index = self._random.choice(pool)
            pcm = self._stretch(self.store.pcm(index))
            if position + pcm.size > row.size or len(words) == most:
                break
            row[position : position + pcm.size] += pcm * self._random.uniform(0.5, 1)
            words.append(self.store.text(index))
            position += pcm.size + int(self._random.expovariate(1 / 0.12) * RATE)
        return " ".join(words) if words else self._one_word(row)

    def _one_word(self, row: np.ndarray) -> str:
        limit = int(np.searchsorted(self.store.lengths, row.size))
        index = self._random.randrange(max(1, limit))
        self._place(row, self.store.pcm(index)[: row.size])
        return self.store.text(index)

    def _stretch(self, pcm: np.ndarray) -> np.ndarray:
        """Play a clip faster or slower, which moves its pitch and formants too."""
        if self._random.random() < 0.4:
            return pcm
        factor = self._random.uniform(0.86, 1.16)
        return np.interp(np.arange(0, pcm.size - 1, factor), np.arange(pcm.size), pcm).astype(np.float32)

    def _place(self, row: np.ndarray, pcm: np.ndarray) -> None:
        pcm = pcm[: row.size]
        start = self._random.randrange(0, row.size - pcm.size + 1)
        row[start : start + pcm.size] = pcm

    def _mask(self, mel: Tensor, is_speech: list[bool]) -> Tensor:
        """SpecAugment, lightly: a band of mel bins and a few frames of some speech rows become the floor."""
        for row, speech in enumerate(is_speech):
            if not speech or self._random.random() < 0.4:
                continue
            floor = float(mel[row].min())
            width, start = self._random.randrange(1, 20), self._random.randrange(0, 108)
            mel[row, start : start + width] = floor
            frames = self._random.randrange(1, 8)
            begin = self._random.randrange(0, max(1, mel.shape[2] - frames))
            mel[row, :, begin : begin + frames] = floor
        return mel


def expand(renderer: PromptRenderer, conversation: Conversation, clips: list[int], tokens: list[int]) -> Row:
    """A conversation about `clips` with as many placeholders for each as it has `tokens`."""
    row, remaining = Row(clips, [], []), iter(clips)
    for token, learn in zip(*renderer.render(conversation), strict=True):
        repeat = tokens[next(remaining)] if token == renderer.audio_id else 1
        row.ids += [token] * repeat
        row.learnt += [learn] * repeat
    return row


def collate(rows: list[Row], audio_id: int) -> list[Rows]:
    """Rows in three parts of about equal length each, so that little is padding."""
    rows = sorted(rows, key=lambda row: len(row.ids))
    cuts = [0, *(round(share * len(rows)) for share in (0.45, 0.84)), len(rows)]
    return [pad_rows(rows[a:b], audio_id) for a, b in pairwise(cuts) if b > a]


def pad_rows(rows: list[Row], audio_id: int) -> Rows:
    """Rows as one tensor, padded on the right, where causal attention never looks."""
    token_ids = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.long)
    answers: list[tuple[int, int, int]] = []
    for number, row in enumerate(rows):
        token_ids[number, : len(row.ids)] = torch.tensor(row.ids)
        answers += [(number, c - 1, row.ids[c]) for c, learn in enumerate(row.learnt) if learn]
    places = torch.tensor(answers).T
    clips = [clip for row in rows for clip in row.clips]
    return Rows(token_ids, token_ids == audio_id, clips, places[0], places[1], places[2])
