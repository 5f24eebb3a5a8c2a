"""Short encoder runs as CUDA graphs: a clip of a few seconds takes the device less time than the host its launches.

A captured run has room for so many encoder frames and a few clips (`model/clip_pack.py`); what the clips leave of it
is one more clip of blanks, so that none of theirs sees it. The spectrogram, a dozen launches, is computed before the
replay, in the same room: cuFFT's plans, which a graph would have to outlive, are not ours to keep. Longer runs keep
the device busy for longer than the host takes, and run eagerly.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.cuda_graphs import Capture, Graph
from engine.device import copy_into, free_bytes
from model.clip_pack import PackedClips, PackShape, Samples, encoder_lens, lay_out
from model.config import num_audio_tokens
from model.qwen2_audio import Qwen2Audio

SIZES = (64, 128, 192, 256, 384, 512)
"""Encoder frames, 50 a second, that the captured runs have room for."""
MAX_CLIPS = 4
"""Of a captured run."""


class EncoderGraphs:
    """One graph for each size. `capture` makes them, `encode` runs the one that fits."""

    def __init__(self, model: Qwen2Audio, capture: Capture) -> None:
        self._model = model
        self._capture = capture
        self._graphs: dict[int, Graph] = {}
        self.sizes = SIZES
        device, (text, audio) = model.device, (model.config.text, model.config.audio)
        largest = self._shape(self.sizes[-1])
        self._signal = torch.zeros(largest.num_samples, device=device)
        self._index = torch.zeros(sum(largest.index_sizes), dtype=torch.int32, device=device)
        self._mel = torch.zeros(audio.num_mel_bins * largest.num_columns, dtype=model.dtype, device=device)
        self._rows = torch.zeros(largest.num_tokens, text.hidden_size, dtype=model.dtype, device=device)
        self.num_bytes = 0
        """Of the device's memory, that the graphs have taken."""
        self.seconds = 0.0
        """That all captures took."""

    def __str__(self) -> str:
        took = f"{self.num_bytes / 2**30:.2f} GiB, {self.seconds:.1f} s"
        return f"{len(self._graphs)} of encoder runs, up to {self.sizes[-1] / 50:.0f} s of audio: {took}"

    @torch.inference_mode()
    def capture(self, *sizes: int) -> None:
        """Make the graphs of these sizes, or of all: the largest first, whose memory the others reuse."""
        started, free = time.monotonic(), free_bytes(self._rows.device)
        for size in sorted(sizes or self.sizes, reverse=True):
            self._fill(size, ())
            self._graphs[size] = self._capture(lambda size=size: self._run(size))  # type: ignore[misc]
        self.num_bytes += free - free_bytes(self._rows.device)
        self.seconds += time.monotonic() - started

    def takes(self, clips: Sequence[Samples]) -> bool:
        """Whether clips, float32 [S_i] at 16 kHz, can be encoded by a replay."""
        return len(clips) <= MAX_CLIPS and sum(encoder_lens(clips)) <= self.sizes[-1]

    def encode(self, clips: Sequence[Samples]) -> tuple[Tensor, ...]:
        """Of clips that it takes: rows of the decoder's input, [A_i, C] each, good until the next run."""
        num_frames = sum(encoder_lens(clips))
        size = next(size for size in self.sizes if size >= num_frames)
        self._fill(size, clips)
        self._graphs[size].replay()
        num_tokens = [num_audio_tokens(len(clip)) for clip in clips]
        return self._rows[: sum(num_tokens)].split_with_sizes(num_tokens)

    def _fill(self, size: int, clips: Sequence[Samples]) -> None:
        """Bring clips to the static arrays: their samples, the indices, the spectrogram."""
        signal, index = lay_out(clips, self._shape(size))
        copy_into(self._signal[: len(signal)], signal)
        copy_into(self._index[: len(index)], index)
        pack, mel = self._views(size)
        mel.copy_(self._model.mel(pack))

    def _run(self, size: int) -> None:
        """What a graph repeats: from the spectrogram to the rows."""
        pack, mel = self._views(size)
        self._rows[: size // 2].copy_(self._model.encode_mel(mel, pack))

    def _views(self, size: int) -> tuple[PackedClips, Tensor]:
        """-> the pack, whose lengths on the host are upper bounds, and its spectrogram, [num_mel_bins, S]."""
        shape = self._shape(size)
        signal, index = self._signal[: shape.num_samples], self._index[: sum(shape.index_sizes)]
        mel = self._mel[: self._model.config.audio.num_mel_bins * shape.num_columns].view(-1, shape.num_columns)
        return PackedClips.view(signal, index, shape, (size,) * shape.num_clips), mel

    @staticmethod
    def _shape(size: int) -> PackShape:
        return PackShape.roomy(MAX_CLIPS, size)
