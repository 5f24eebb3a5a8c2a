"""From any source to `Pcm` without ever holding up the event loop.

Fetching runs on the loop; base64 and hashes take a small pool of threads, which release the GIL and have a
priority lower than the loop's; decoding and resampling take a process for each of those threads
(`audio.decoder_pool`). A semaphore as wide as the pool keeps waiting clips out of its queue, so one that is
cancelled while waiting costs nothing. How long a clip may be for the model is not known here.
"""

import asyncio
import os
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import IO, TYPE_CHECKING

from audio.decoder_pool import DECODER_NICENESS, DecoderPool
from audio.errors import AudioFetchError
from audio.limits import MIB, AudioLimits, DecoderLimits
from audio.local_file import LocalFiles, is_file_url
from audio.observer import NOBODY, LoadObserver
from audio.pcm import Pcm
from audio.sniff import NUM_SNIFFED_BYTES, container_name
from audio.source import AudioFile, AudioSource, InlineAudio, Text, is_data_url, write_data_url, write_inline

if TYPE_CHECKING:
    from audio.fetch import MediaFetcher

_MIN_WORKERS, _MAX_WORKERS = 2, 8
MAX_SPOOLED_BYTES = MIB
"""Of a clip's file in memory; a longer one is on disk."""

_OpenFile = AbstractContextManager[IO[bytes]]


class AudioLoader:
    """Loads clips, several at once. Owns `fetcher`; None refuses links.

    local_files: what file: URLs may name; None refuses them. num_cores: as many decoders, from two to eight.
    Use from one event loop; close with `aclose`.
    """

    def __init__(
        self,
        limits: AudioLimits,
        fetcher: "MediaFetcher | None" = None,
        local_files: LocalFiles | None = None,
        num_cores: int = _MIN_WORKERS,
        decoder_limits: DecoderLimits | None = None,
    ) -> None:
        self._limits = limits
        self._fetcher = fetcher
        self._local_files = local_files
        self._num_workers = min(max(_MIN_WORKERS, num_cores), _MAX_WORKERS)
        self._decoders = DecoderPool(limits, decoder_limits)
        self._executor = ThreadPoolExecutor(self._num_workers, "audio-decode", _yield_to_others)
        self._slots = asyncio.Semaphore(self._num_workers)

    def warm_up(self) -> None:
        """Begin to start the decoders, which takes a moment: the first clips would wait for them."""
        self._executor.submit(self._decoders.start, self._num_workers)

    async def load(self, source: AudioSource, scope: str = "", observer: LoadObserver = NOBODY) -> Pcm:
        """The clip at `source`; what was fetched in the same scope may serve again.

        Raises AudioError, whose subclass and code say what is wrong.
        """
        opened = await self._opener(source, scope, observer)

        def load() -> Pcm:
            with opened() as file:
                observer.file(file.seek(0, os.SEEK_END), _container_of(file))
                with _timed(observer, "decode"):
                    return Pcm(self._decoders.decode(file, partial(_resampled, observer)))

        async with self._slots:
            return await asyncio.get_running_loop().run_in_executor(self._executor, load)

    async def stream(
        self, file: IO[bytes], limits: AudioLimits, max_samples: int, observer: LoadObserver = NOBODY
    ) -> AsyncGenerator[Pcm, None]:
        """The windows of a seekable file, cut by `audio.segment`, each decoded when it is asked for.

        `limits` are this file's, instead of the loader's own. The file is in use until the generator is closed.
        Raises AudioError.
        """
        windows = self._decoders.windows(file, limits, max_samples, partial(_resampled, observer))
        in_use = threading.Lock()  # a step whose reader was cancelled may still be running

        def step() -> Pcm | None:
            with in_use, _timed(observer, "decode"):
                samples = next(windows, None)
                return None if samples is None else Pcm(samples)

        def close() -> None:
            with in_use:
                windows.close()

        loop = asyncio.get_running_loop()
        try:
            while True:
                async with self._slots:
                    window = await loop.run_in_executor(self._executor, step)
                if window is None:
                    return
                yield window
        finally:
            await loop.run_in_executor(None, close)

    async def aclose(self) -> None:
        """Drop what waits, let running decodes end, close the connections and the decoders."""
        if self._fetcher is not None:
            await self._fetcher.aclose()
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)
        await asyncio.to_thread(self._decoders.close)

    async def _opener(self, source: AudioSource, scope: str, observer: LoadObserver) -> Callable[[], _OpenFile]:
        """What opens the clip's file when called in a worker: even base64 is too slow for the loop."""
        if isinstance(source, AudioFile):
            return lambda: nullcontext(source.file)
        if isinstance(source, InlineAudio):
            return partial(self._written, write_inline, source.data)
        if is_data_url(source.url):
            return partial(self._written, write_data_url, source.url)
        assert isinstance(source.url, str), "filed texts are data: URLs, or refused as such"
        if is_file_url(source.url):
            if self._local_files is None:
                raise AudioFetchError("media_url_refused", "This server does not read audio from file: URLs.")
            return partial(self._local_files.open, source.url)
        if self._fetcher is None:
            raise AudioFetchError("media_url_refused", "This server does not fetch audio from URLs.")
        with _timed(observer, "fetch"):
            file = await self._fetcher.fetch(source.url, scope)
        return lambda: file

    @contextmanager
    def _written(
        self, write: Callable[[Text, IO[bytes], AudioLimits], None], text: Text
    ) -> Generator[IO[bytes], None, None]:
        """A file of what `write` makes of `text`: on disk unless it is small."""
        with tempfile.SpooledTemporaryFile(MAX_SPOOLED_BYTES) as file:
            write(text, file, self._limits)
            yield file


@contextmanager
def _timed(observer: LoadObserver, stage: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        observer.stage(stage, began, time.monotonic())


def _yield_to_others() -> None:
    """Lower this thread's priority. Elsewhere than on Linux threads have none of their own."""
    if sys.platform == "linux":
        niceness = os.getpriority(os.PRIO_PROCESS, 0) + DECODER_NICENESS
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def _resampled(observer: LoadObserver, seconds: float) -> None:
    """Resampling and decoding alternate: it is told as if it came last."""
    if seconds:
        now = time.monotonic()
        observer.stage("resample", now - seconds, now)


def _container_of(file: IO[bytes]) -> str:
    file.seek(0)
    return container_name(file.read(NUM_SNIFFED_BYTES))
