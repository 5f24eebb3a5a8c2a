"""The clips of a request: where its audio parts point, loaded side by side, checked against what the model hears.

Every failure is a 400 that names the part, or a 404 where it names no upload. Fetching and decoding are the audio
package's; this module knows the model's window (30 s) and how many positions a clip takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from audio import AudioError, AudioLoader, AudioSource, AudioUrl, InlineAudio, Pcm
from model.config import MAX_AUDIO_SAMPLES, MAX_AUDIO_SECONDS, SAMPLE_RATE, num_audio_tokens
from server.audio_store import AudioStore
from server.auth import EVERYBODY
from server.errors import ApiError, bad_request
from server.schema import AudioPart, AudioUrlPart, InputAudioPart


@dataclass(frozen=True, slots=True)
class ClipRef:
    """An audio part and where it stands in the request (`messages[0].content[1]`)."""

    part: AudioPart
    param: str


@dataclass(frozen=True, slots=True)
class Clip:
    """Audio that the model can hear."""

    samples: NDArray[np.float32]
    """[S], mono, 16 kHz, at most 30 s."""
    content_hash: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class MediaLoader:
    """Loads the clips of requests."""

    loader: AudioLoader
    max_clips: int
    """In one request."""
    store: AudioStore
    caller: str = EVERYBODY
    """Whose uploads the ids in requests mean."""

    def of(self, caller: str) -> MediaLoader:
        """The same loader, for the uploads of `caller`."""
        return replace(self, caller=caller)

    async def load(self, refs: Sequence[ClipRef]) -> list[Clip]:
        """Load all clips at once; the first failure cancels the rest. Raises ApiError."""
        if len(refs) > self.max_clips:
            message = f"Too many audio clips: this request has {len(refs)}, at most {self.max_clips} are accepted."
            raise bad_request(message, refs[self.max_clips].param, "too_many_audio_clips")
        tasks = [asyncio.create_task(self._load(ref)) for ref in refs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _load(self, ref: ClipRef) -> Clip:
        pcm = self._stored(ref) or await self.read(_source(ref.part), ref.param)
        if pcm.num_samples > MAX_AUDIO_SAMPLES:
            raise _too_long(pcm.num_samples, ref.param)
        return Clip(pcm.samples, pcm.content_hash, check_audible(pcm.num_samples, ref.param))

    def _stored(self, ref: ClipRef) -> Pcm | None:
        """The upload that the part names, if it names one."""
        if not isinstance(ref.part, InputAudioPart) or (audio_id := ref.part.input_audio.id) is None:
            return None
        audio = self.store.get(self.caller, audio_id)
        if audio is None:
            message = f"There is no audio with the id '{audio_id[:100]}': it is unknown, expired or not yours."
            raise ApiError(404, message, param=f"{ref.param}.input_audio.id", code="audio_not_found")
        return audio.pcm

    async def read(self, source: AudioSource, param: str) -> Pcm:
        """Fetch and decode a clip. Raises ApiError that names `param`."""
        try:
            return await self.loader.load(source)
        except AudioError as error:
            raise bad_request(error.message, param, error.code) from None


def check_audible(num_samples: int, param: str) -> int:
    """How many tokens a clip takes. Raises ApiError when it is too short to be heard."""
    num_tokens = num_audio_tokens(num_samples)
    if num_tokens == 0:
        message = f"The audio is too short: {1000 * num_samples / SAMPLE_RATE:.0f} ms; the model needs over 20 ms."
        raise bad_request(message, param, "audio_too_short")
    return num_tokens


def _source(part: AudioPart) -> AudioSource:
    match part:
        case InputAudioPart():
            return InlineAudio(part.input_audio.data or "", part.input_audio.format)
        case AudioUrlPart():
            return AudioUrl(part.audio_url.url)
        case _:
            return AudioUrl(part.audio_url or part.audio or "")


def _too_long(num_samples: int, param: str) -> ApiError:
    duration = num_samples / SAMPLE_RATE
    message = f"The audio is too long: {duration:.2f} s; the model hears at most {MAX_AUDIO_SECONDS} s of one clip."
    return bad_request(message, param, "audio_too_long")
