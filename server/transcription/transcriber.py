"""A file of any length to its text: decoded, cut and transcribed window by window, in bounded memory.

Windows are decoded only as fast as they are transcribed: a bounded number of them is with the engine at once,
where continuous batching runs them side by side. Their texts come out in order, the first ones while the file is
still being decoded. A window that fails fails the whole: no text with a hole is ever given. Windows of digital
silence are not sent to the model, which would describe them. Closing the iterator aborts all of it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import IO

import numpy as np

from audio import AudioError, AudioLimits, AudioLoader, Pcm
from engine.messages import AudioClip, EngineRequest, SamplingParams, TokenLogprobs
from model.config import SAMPLE_RATE
from server.access.auth import cache_salt
from server.access.held_bytes import HeldBytes
from server.errors import bad_request
from server.generation.channel import Channel
from server.generation.detokenizer import IncrementalDetokenizer
from server.generation.generation import Delta, Generation, Usage
from server.generation.sampling import GREEDY_BELOW, SMALLEST_TOP_P
from server.generation.serving import Serving, salted
from server.media.loader import Clip, check_audible
from server.transcription.form import TranscriptionForm
from server.transcription.recipe import Recipe
from server.transcription.text import TranscriptText

MAX_WINDOWS_IN_FLIGHT = 16
"""Of one file: enough to fill a batch, few enough that other requests find room. 2 MB each at 30 s."""
ROOM_POLL_SECONDS = 0.05
SAMPLE_BYTES = 4
MAX_WINDOW_TOKENS = 1024
"""Of one window's text, unless the request says less: three times what the fastest speaker needs for 30 s."""
SILENCE = 2.0**-14
"""A window whose loudest sample is no more than two steps of 16 bits is digital silence."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The text of one window that had any. Times are where the window was really cut."""

    start_s: float
    end_s: float
    text: str
    tokens: tuple[TokenLogprobs, ...]
    """Only for verbose_json."""


@dataclass(slots=True)
class TranscriptUsage:
    """Sums over the windows."""

    num_samples: int = 0
    prompt_tokens: int = 0
    audio_tokens: int = 0
    completion_tokens: int = 0

    @property
    def seconds(self) -> float:
        """How long the file lasts, silence included."""
        return self.num_samples / SAMPLE_RATE

    def add(self, usage: Usage) -> None:
        """Count a window."""
        self.prompt_tokens += usage.prompt_tokens
        self.audio_tokens += usage.audio_tokens
        self.completion_tokens += usage.completion_tokens


@dataclass(frozen=True, slots=True)
class Transcriber:
    """What all transcriptions of a server share."""

    serving: Serving
    loader: AudioLoader
    limits: AudioLimits
    """Of a file."""
    recipe: Recipe
    window_samples: int

    def transcription(self, form: TranscriptionForm, file: IO[bytes]) -> Transcription:
        """A transcription not yet begun. Raises ApiError for what the recipe has no place for."""
        self.recipe.check(form)
        return Transcription(self, form, file)


@dataclass(frozen=True, slots=True)
class _Window:
    start: int
    num_samples: int
    generation: Generation | None = None
    """None: silence."""
    deltas: Channel[Delta] | None = None


@dataclass(slots=True)
class Transcription:
    """One file being transcribed. Iterate over `pieces` once; the file is in use until that is closed."""

    transcriber: Transcriber
    form: TranscriptionForm
    file: IO[bytes]
    usage: TranscriptUsage = field(default_factory=TranscriptUsage)
    text: TranscriptText = field(default_factory=TranscriptText)
    _running: set[Channel[Delta]] = field(default_factory=set)
    _is_let_in: bool = False

    @property
    def _held(self) -> HeldBytes:
        """By its request."""
        return self.transcriber.serving.media.held

    async def pieces(self) -> AsyncGenerator[str | Segment, None]:
        """The text in pieces that put end to end are the whole; after a window's pieces, its segment.

        Raises ApiError, RequestError, EngineDeadError.
        """
        slots = asyncio.Semaphore(MAX_WINDOWS_IN_FLIGHT)
        windows = Channel(self._windows(slots))
        try:
            while True:
                try:
                    window = await windows.get(None)
                except StopAsyncIteration:
                    return
                self.usage.num_samples += window.num_samples
                async with aclosing(self._window_pieces(window)) as pieces:
                    async for piece in pieces:
                        yield piece
                slots.release()
        finally:
            await windows.aclose()
            await asyncio.gather(*(channel.aclose() for channel in self._running))

    async def _windows(self, slots: asyncio.Semaphore) -> AsyncGenerator[_Window, None]:
        """Windows in order, each already with the engine. A slot is taken for each."""
        transcriber = self.transcriber
        record = transcriber.serving.record
        stream = transcriber.loader.stream(self.file, transcriber.limits, transcriber.window_samples, record)
        start = 0
        async with aclosing(stream) as windows:
            while True:
                await slots.acquire()
                await self._room_for_another()
                try:
                    pcm = await anext(windows, None)
                except AudioError as error:
                    raise bad_request(error.message, "file", error.code) from None
                if pcm is None:
                    return
                record.clip_seconds.append(pcm.duration_s)
                media = transcriber.serving.media
                media.quotas.charge_audio(media.caller, pcm.duration_s)
                yield await self._begin(pcm, start)
                start += pcm.num_samples

    async def _room_for_another(self) -> None:
        """A file may always have one window. Its next wait while other requests' audio fills the memory."""
        audio = self._held.audio
        while self._running and not audio.has_room(SAMPLE_BYTES * self.transcriber.window_samples):
            await asyncio.sleep(ROOM_POLL_SECONDS)

    async def _begin(self, pcm: Pcm, start: int) -> _Window:
        generation = await asyncio.to_thread(self._hear, pcm, is_first=start == 0)
        if generation is None:
            return _Window(start, pcm.num_samples)
        if not self._is_let_in:  # once for the file: it has few windows with the engine at any time
            generation.queue.check_room(len(generation.request.prompt_token_ids))
            self._is_let_in = True
        deltas = Channel(generation.deltas())
        self._running.add(deltas)
        self._held.count_audio(pcm.samples.nbytes)
        return _Window(start, pcm.num_samples, generation, deltas)

    def _hear(self, pcm: Pcm, *, is_first: bool) -> Generation | None:
        """Blocking: looks at every sample. None: silence."""
        is_silent = np.abs(pcm.samples).max() <= SILENCE
        if is_first or not is_silent:
            check_audible(pcm.num_samples, "file")
        return None if is_silent else self._generation(Clip.of(pcm))

    async def _window_pieces(self, window: _Window) -> AsyncGenerator[str | Segment, None]:
        self.text.begin_window()
        if window.generation is None or window.deltas is None:
            return
        text: list[str] = []
        tokens: list[TokenLogprobs] = []
        is_last = False
        while not is_last:
            delta = await window.deltas.get(None)
            is_last = delta.finish_reason is not None
            tokens += delta.logprobs
            if piece := self.text.push(delta.text, is_last=is_last):
                text.append(piece)
                yield piece
        self.usage.add(window.generation.usage)
        self._running.discard(window.deltas)
        self._held.count_audio(-SAMPLE_BYTES * window.num_samples)
        await window.deltas.aclose()
        if text:
            end = window.start + window.num_samples
            yield Segment(window.start / SAMPLE_RATE, end / SAMPLE_RATE, "".join(text).strip(), tuple(tokens))

    def _generation(self, clip: Clip) -> Generation:
        serving = self.transcriber.serving
        prompt = self.transcriber.recipe.prompt(serving.prompts, self.form, clip.num_tokens)
        num_prompt_tokens = len(prompt.token_ids)
        (offset,) = prompt.clip_offsets
        salt = cache_salt(serving.media.caller, None)
        return Generation(
            engine=serving.engine,
            request=EngineRequest(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=prompt.token_ids,
                sampling=self._sampling(serving.engine.info.max_model_len - num_prompt_tokens),
                clips=(AudioClip(clip.samples, salted(clip, salt), offset, clip.num_tokens),),
                cache_salt=salt,
                time_limit_s=serving.time_limit_s,
            ),
            new_detokenizer=partial(IncrementalDetokenizer, serving.prompts.tokenizer),
            usage=Usage(num_prompt_tokens, prompt.num_audio_tokens),
            queue=serving.queue,
            eos_token_ids=frozenset(serving.defaults.eos_token_ids),
            record=serving.record,
            began=time.monotonic(),
        )

    def _sampling(self, room: int) -> SamplingParams:
        """Greedy and without penalties unless asked: a speaker may well say a word twice."""
        form = self.form
        return SamplingParams(
            max_tokens=min(form.max_completion_tokens or MAX_WINDOW_TOKENS, room),
            temperature=form.temperature if form.temperature >= GREEDY_BELOW else 0.0,
            top_k=max(form.top_k, 0),
            top_p=max(form.top_p, SMALLEST_TOP_P),
            min_p=form.min_p,
            repetition_penalty=form.repetition_penalty,
            presence_penalty=form.presence_penalty,
            frequency_penalty=form.frequency_penalty,
            seed=form.seed,
            stop_token_ids=self.transcriber.serving.defaults.eos_token_ids,
            logprobs=0 if form.response_format == "verbose_json" else None,
        )
