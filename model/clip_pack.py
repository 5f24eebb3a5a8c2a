"""Clips laid end to end for one encoder run: what is sent to the device, in two copies, and where everything is.

All of it is laid out on the host, from the clips' lengths alone. In the signal, each clip has a stretch of its own,
whole hops long, with the samples that the reference would reflect at its ends, and silence up to the end of the last
frame that can see it; so frames cut from the signal at every hop are those of each clip alone. A run's frames come
in columns, each clip in a slot of 2 C + 2 (audio_encoder explains them). Blank columns get the last frame that holds
audio: where F is even no convolution sees it (see log_mel), but it may be the clip's loudest.

A pack can have room for more than its clips need, so that runs of many lengths have one shape: what is left of the
columns is blank, and what is left of the frames is one more clip, whose embeddings nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention.base import EncoderMetadata
from model.config import HOP_LENGTH, MAX_AUDIO_SAMPLES, MAX_MEL_FRAMES, num_conv_frames, num_mel_frames
from model.log_mel import N_FFT, num_input_frames

Samples = NDArray[np.float32]
Int32Array = NDArray[np.int32]

HALF = N_FFT // 2
"""Samples that are reflected at each end."""


@dataclass(frozen=True, slots=True)
class PackShape:
    """How large the arrays of a pack are."""

    num_clips: int
    num_frames: int
    """E: encoder frames."""
    num_tokens: int
    """A: audio tokens."""
    num_columns: int
    """S: mel frames and blanks."""
    num_hops: int
    """Of the signal, HOP_LENGTH samples each."""

    @classmethod
    def of(cls, clips: Sequence[Samples], multiple: int = 1) -> PackShape:
        """No larger than the clips need, but that the columns are a multiple of a number.

        Transforms of as many frames as before find their plan made.
        """
        lens = encoder_lens(clips)
        num_columns = 2 * sum(lens) + 2 * len(lens)
        return cls(
            num_clips=len(clips),
            num_frames=sum(lens),
            num_tokens=sum(c // 2 for c in lens),
            num_columns=-(-num_columns // multiple) * multiple,
            num_hops=sum(_num_seen_frames(len(clip)) + 2 for clip in clips),
        )

    @classmethod
    def roomy(cls, num_clips: int, num_frames: int) -> PackShape:
        """For up to so many clips of up to so many encoder frames together."""
        return cls(
            num_clips=num_clips + 1,
            num_frames=num_frames,
            num_tokens=num_frames // 2,
            num_columns=2 * num_frames + 2 * num_clips,
            num_hops=2 * num_frames + 4 * num_clips,
        )

    @property
    def num_samples(self) -> int:
        """Of the signal."""
        return self.num_hops * HOP_LENGTH

    @property
    def index_sizes(self) -> list[int]:
        """Of the parts of the index array, see `PackedClips`."""
        return [*3 * [self.num_columns], *2 * [self.num_frames], self.num_tokens, self.num_clips + 1]


@dataclass(frozen=True, slots=True)
class PackedClips:
    """Tensors of one encoder run. The integers are int32, views of one array."""

    signal: Tensor
    """float32 [HOP_LENGTH x hops]"""
    frame_of_column: Tensor
    """[S]: the hop at which a column's frame begins."""
    clip_of_column: Tensor
    """[S]"""
    is_blank: Tensor
    """[S]: 1 where a column is no input of the convolutions but zeros."""
    frame_index: Tensor
    """[E]: which outputs of conv2 are real."""
    positions: Tensor
    """[E]: 0..C-1 of each clip."""
    pool_index: Tensor
    """[A]: the first of the two frames that each audio token averages."""
    metadata: EncoderMetadata

    @classmethod
    def view(cls, signal: Tensor, index: Tensor, shape: PackShape, lens: tuple[int, ...]) -> PackedClips:
        """Of arrays as `lay_out` makes them. lens: encoder frames of each clip, for the host."""
        columns, clip_of_column, is_blank, frames, positions, pool_index, starts = index.split_with_sizes(
            shape.index_sizes
        )
        metadata = EncoderMetadata(lens=lens, starts=starts)
        return cls(signal, columns, clip_of_column, is_blank, frames, positions, pool_index, metadata)


def pack_clips(clips: Sequence[Samples], device: torch.device) -> PackedClips:
    """clips: float32 [S_i] at 16 kHz, on the host."""
    shape = PackShape.of(clips, multiple=256 if device.type == "cuda" else 1)
    signal, index = (_to_device(array, device) for array in lay_out(clips, shape))
    return PackedClips.view(signal, index, shape, encoder_lens(clips))


def encoder_lens(clips: Sequence[Samples]) -> tuple[int, ...]:
    """C: encoder frames of each clip."""
    return tuple(num_conv_frames(num_mel_frames(len(clip))) for clip in clips)


def lay_out(clips: Sequence[Samples], shape: PackShape) -> tuple[Samples, Int32Array]:
    """-> the signal, and the index array."""
    signal = np.zeros(shape.num_samples, dtype=np.float32)
    index = np.zeros(sum(shape.index_sizes), dtype=np.int32)
    parts = np.split(index, np.cumsum(shape.index_sizes)[:-1])
    frame_of_column, clip_of_column, is_blank, frame_index, positions, pool_index, starts = parts
    clip_of_column[:] = shape.num_clips - 1
    is_blank[:] = 1
    hop = column = frame = token = 0
    for clip, samples in enumerate(clips):
        num_seen, c = _num_seen_frames(len(samples)), num_conv_frames(num_mel_frames(len(samples)))
        stretch = signal[hop * HOP_LENGTH : (hop + num_seen + 2) * HOP_LENGTH]
        _write_reflected(stretch, np.asarray(samples, dtype=np.float32))
        slot = slice(column, column + 2 * c + 2)
        real = slice(column + 1, column + 1 + num_input_frames(len(samples)))
        frame_of_column[slot] = hop + num_seen - 1
        frame_of_column[real] = np.arange(hop, hop + real.stop - real.start)
        clip_of_column[slot] = clip
        is_blank[real] = 0
        frame_index[frame : frame + c] = np.arange(column // 2, column // 2 + c)
        positions[frame : frame + c] = np.arange(c)
        pool_index[token : token + c // 2] = np.arange(frame, frame + c - 1, 2)
        starts[clip + 1] = frame + c
        hop, column, frame, token = hop + num_seen + 2, slot.stop, frame + c, token + c // 2
    starts[len(clips) + 1 :] = frame
    starts[-1] = shape.num_frames
    return signal, index


def _num_seen_frames(num_samples: int) -> int:
    """Mel frames that can see audio; the last of them is no input of the convolutions where F is even."""
    return min(num_mel_frames(num_samples) + 2, MAX_MEL_FRAMES)


def _write_reflected(stretch: Samples, samples: Samples) -> None:
    """A clip as the reference pads it, as far as its stretch reaches; what is there is zeros."""
    assert 0 < len(samples) <= MAX_AUDIO_SAMPLES, "the clip's length is checked before it gets here"
    stretch[HALF : HALF + len(samples)] = samples
    stretch[:HALF] = stretch[HALF + 1 : 2 * HALF + 1][::-1]
    end = HALF + MAX_AUDIO_SAMPLES  # where the reference reflects: only clips that fill the window have frames there
    tail = stretch[end : min(end + HALF, len(stretch))]
    tail[:] = stretch[end - 1 - len(tail) : end - 1][::-1]


def _to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Without waiting for what runs there."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
