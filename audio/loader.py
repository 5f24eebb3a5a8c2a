"""From any source to `Pcm` without ever holding up the event loop.

Fetching runs on the loop; base64, decoding and resampling run in a small pool of threads, whose
libraries release the GIL, and whose priority is lower than the loop's. A semaphore as wide as the pool
keeps waiting clips out of its queue, so one that is cancelled while waiting costs nothing. How long a
clip may be for the model is not known here.
"""

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO

from audio.decode import decode, decode_blocks
from audio.errors import AudioFetchError
from audio.fetch import MediaFetcher
from audio.limits import AudioLimits
from audio.observer import NOBODY, LoadObserver
from audio.pcm import Pcm
from audio.segment import segment
from audio.sniff import container_name
from audio.source import AudioBytes, AudioSource, InlineAudio, decode_data_url, decode_inline, is_data_url

DECODER_NICENESS = 5
"""Above the event loop's: where all cores are busy, a long file waits rather than everybody else."""


class AudioLoader:
    """Loads clips, at most `num_workers` being decoded at once. Owns `fetcher`; None refuses links.

    Use from one event loop; close with `aclose`.
    """

    def __init__(self, limits: AudioLimits, fetcher: MediaFetcher | None = None, num_workers: int = 2) -> None:
        self._limits = limits
        self._fetcher = fetcher
        self._executor = ThreadPoolExecutor(num_workers, "audio-decode", _yield_to_others)
        self._slots = asyncio.Semaphore(num_workers)

    async def load(self, source: AudioSource, observer: LoadObserver = NOBODY) -> Pcm:
        """The clip at `source`. Raises AudioError, whose subclass and code say what is wrong."""
        read = await self._reader(source, observer)

        def load() -> Pcm:
            data = read()
            observer.file(len(data), container_name(data))
            with _timed(observer, "decode"):
                return decode(data, self._limits)

        async with self._slots:
            return await asyncio.get_running_loop().run_in_executor(self._executor, load)

    async def stream(
        self, file: IO[bytes], limits: AudioLimits, max_samples: int, observer: LoadObserver = NOBODY
    ) -> AsyncGenerator[Pcm, None]:
        """The windows of a seekable file, cut by `audio.segment`, each decoded when it is asked for.

        `limits` are this file's, instead of the loader's own. The file is in use until the generator is closed.
        Raises AudioError.
        """
        windows = segment(decode_blocks(file, limits), max_samples)
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
        """Drop what waits, let running decodes end, close the connections."""
        if self._fetcher is not None:
            await self._fetcher.aclose()
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)

    async def _reader(self, source: AudioSource, observer: LoadObserver) -> Callable[[], bytes]:
        """What gives the file's bytes when called in a worker: even base64 is too slow for the loop."""
        limits = self._limits
        if isinstance(source, AudioBytes):
            return lambda: source.data
        if isinstance(source, InlineAudio):
            return lambda: decode_inline(source.data, limits)
        if is_data_url(source.url):
            return lambda: decode_data_url(source.url, limits)
        if self._fetcher is None:
            raise AudioFetchError("media_url_refused", "This server does not fetch audio from URLs.")
        with _timed(observer, "fetch"):
            data = await self._fetcher.fetch(source.url)
        return lambda: data


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
