"""The recordings of a request: where its audio parts point, loaded side by side, fitted to what the model hears.

A recording within the model's window (30 s) is one clip. A longer one is cut into consecutive clips, refused or
truncated, as the request or the server's setting says; only truncation loses anything, and it is counted. Every
failure is a 400 that names the part, or a 404 where it names no upload. Fetching, decoding and where to cut are the
audio package's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from audio import AudioError, AudioLoader, AudioSource, AudioUrl, InlineAudio, Pcm, segment
from model.config import MAX_AUDIO_SAMPLES, MAX_AUDIO_SECONDS, SAMPLE_RATE, num_audio_tokens
from server.access.auth import EVERYBODY
from server.access.held_bytes import HeldBytes
from server.access.quota import Quotas
from server.errors import ApiError, bad_request
from server.media.store import AudioStore
from server.observe.request_record import RequestRecord
from server.requests.content_parts import AudioPart, AudioUrlPart, InputAudioPart
from server.requests.schema import LongAudio


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

    @classmethod
    def of(cls, pcm: Pcm) -> Clip:
        """A clip of at most 30 s."""
        return cls(pcm.samples, pcm.content_hash, num_audio_tokens(pcm.num_samples))


@dataclass(frozen=True, slots=True)
class Recording:
    """One audio part as the model hears it."""

    param: str
    """Where the part stands in the request."""
    clips: tuple[Clip, ...]
    """Consecutive, more than one only when it was split."""
    duration_s: float
    """Of all of it, truncated or not."""
    truncated_s: float = 0.0
    """Seconds at its end that the model does not hear."""


@dataclass(slots=True)
class _Total:
    """The audio of one request, counted while it is decoded."""

    most_s: float
    most_tokens: float
    num_left: int
    """Parts that have not been heard."""
    seconds: float = 0.0
    num_tokens: int = 0

    def add(self, seconds: float, param: str) -> None:
        """Raises ApiError when it is too much."""
        self.seconds += seconds
        if self.seconds > self.most_s:
            message = f"Too much audio: at most {self.most_s:g} s are accepted in one request, all parts together."
            raise bad_request(message, param, "too_much_audio")

    def hear(self, recording: Recording) -> Recording:
        """Count a part. Raises ApiError when no context holds what there is by now: no more need be decoded."""
        self.num_left -= 1
        self.num_tokens += sum(clip.num_tokens for clip in recording.clips)
        if self.num_left and self.num_tokens >= self.most_tokens:
            message = (
                f"This model's maximum context length is {self.most_tokens} tokens. However, some of this request's "
                f"audio alone resulted in {self.num_tokens} tokens. Please send less audio."
            )
            raise bad_request(message, recording.param, "context_length_exceeded")
        return recording


@dataclass(frozen=True, slots=True)
class MediaLoader:
    """Loads the recordings of requests."""

    loader: AudioLoader
    max_clips: int
    """Audio parts in one request."""
    store: AudioStore
    long_audio: LongAudio = "split"
    """For requests that do not say."""
    caller: str = EVERYBODY
    """Whose uploads the ids in requests mean, and who is charged."""
    max_request_seconds: float = math.inf
    """Of all parts of a request together."""
    max_request_tokens: float = math.inf
    """The same: what a context holds."""
    quotas: Quotas = field(default_factory=Quotas)
    record: RequestRecord = field(default_factory=RequestRecord)
    """Of the request whose recordings these are."""
    held: HeldBytes = field(default_factory=HeldBytes)
    """By it."""

    def of(self, caller: str) -> MediaLoader:
        """The same loader, for the uploads of `caller`."""
        return replace(self, caller=caller)

    async def load(self, refs: Sequence[ClipRef], long_audio: LongAudio | None = None) -> list[Recording]:
        """Load all parts at once; the first failure cancels the rest. Raises ApiError."""
        if len(refs) > self.max_clips:
            message = f"Too many audio clips: this request has {len(refs)}, at most {self.max_clips} are accepted."
            raise bad_request(message, refs[self.max_clips].param, "too_many_audio_clips")
        if refs:
            self.quotas.check_audio(self.caller)
        total = _Total(self.max_request_seconds, self.max_request_tokens, len(refs))
        tasks = [asyncio.create_task(self._load(ref, long_audio or self.long_audio, total)) for ref in refs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _load(self, ref: ClipRef, long_audio: LongAudio, total: _Total) -> Recording:
        pcm = self._stored(ref) or await self.read(_source(ref.part), ref.param)
        self.quotas.charge_audio(self.caller, pcm.duration_s)
        self.held.hold_audio(pcm.samples.nbytes)
        total.add(pcm.duration_s, ref.param)
        check_audible(pcm.num_samples, ref.param)
        if pcm.num_samples <= MAX_AUDIO_SAMPLES:
            return total.hear(Recording(ref.param, (Clip.of(pcm),), pcm.duration_s))
        if long_audio == "error":
            raise _too_long(pcm.num_samples, ref.param)
        return total.hear(await asyncio.to_thread(_fit, pcm, ref.param, long_audio))

    def _stored(self, ref: ClipRef) -> Pcm | None:
        """The upload that the part names, if it names one."""
        if not isinstance(ref.part, InputAudioPart) or (audio_id := ref.part.input_audio.id) is None:
            return None
        audio = self.store.get(self.caller, audio_id)
        if audio is None:
            message = f"There is no audio with the id '{audio_id[:100]}': it is unknown, expired or not yours."
            raise ApiError(404, message, param=f"{ref.param}.input_audio.id", code="audio_not_found")
        self.record.clip_seconds.append(audio.pcm.duration_s)
        return audio.pcm

    async def read(self, source: AudioSource, param: str) -> Pcm:
        """Fetch and decode a clip. Raises ApiError that names `param`."""
        try:
            pcm = await self.loader.load(source, self.caller, self.record)
        except AudioError as error:
            raise bad_request(error.message, param, error.code) from None
        self.record.clip_seconds.append(pcm.duration_s)
        return pcm


def check_audible(num_samples: int, param: str) -> None:
    """Raise ApiError for sound that gives the model nothing to hear."""
    if num_audio_tokens(num_samples) == 0:
        message = f"The audio is too short: {1000 * num_samples / SAMPLE_RATE:.0f} ms; the model needs over 20 ms."
        raise bad_request(message, param, "audio_too_short")


def _fit(pcm: Pcm, param: str, long_audio: LongAudio) -> Recording:
    """Blocking: hashes every clip."""
    if long_audio == "truncate":
        clip = Clip.of(Pcm(pcm.samples[:MAX_AUDIO_SAMPLES]))
        return Recording(param, (clip,), pcm.duration_s, pcm.duration_s - MAX_AUDIO_SECONDS)
    windows = segment([pcm.samples], MAX_AUDIO_SAMPLES)
    return Recording(param, tuple(Clip.of(Pcm(window)) for window in windows), pcm.duration_s)


def all_clips(recordings: Sequence[Recording]) -> list[Clip]:
    """Their clips, in order."""
    return [clip for recording in recordings for clip in recording.clips]


def check_windows_fit(recordings: Sequence[Recording], max_model_len: int) -> None:
    """Raise ApiError when recordings that were split make a prompt that no context can hold."""
    num_tokens = sum(clip.num_tokens for clip in all_clips(recordings))
    split = [recording for recording in recordings if len(recording.clips) > 1]
    if split and num_tokens >= max_model_len:
        message = (
            f"The audio is too long for one prompt: split into windows of at most {MAX_AUDIO_SECONDS} s, all audio "
            f"of this request takes {num_tokens} tokens, and this model's maximum context length is {max_model_len} "
            f"tokens. This part lasts {split[0].duration_s:.0f} s. Send less audio, transcribe it with "
            "/v1/audio/transcriptions, or ask for its beginning with 'long_audio': 'truncate'."
        )
        raise bad_request(message, split[0].param, "context_length_exceeded")


def truncated_seconds(recordings: Sequence[Recording]) -> float:
    """Of all recordings together."""
    return sum(recording.truncated_s for recording in recordings)


def truncation_header(recordings: Sequence[Recording]) -> dict[str, str]:
    """A header that names every part that was truncated, with its length before and after; none: no header."""
    told = [
        f"{recording.param}={recording.duration_s:.2f}->{recording.duration_s - recording.truncated_s:.2f}"
        for recording in recordings
        if recording.truncated_s
    ]
    return {"x-audio-truncated": ", ".join(told)} if told else {}


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
    message = (
        f"The audio is too long: {duration:.2f} s; the model hears at most {MAX_AUDIO_SECONDS} s of one clip. "
        "Ask for 'long_audio': 'split' or 'truncate' to send it all the same."
    )
    return bad_request(message, param, "audio_too_long")
