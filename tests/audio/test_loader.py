"""Every source through the loader, and the event loop alive meanwhile."""

import ast
import asyncio
import base64
import io
import os
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import audio
from audio import (
    AudioError,
    AudioFile,
    AudioLimits,
    AudioLoader,
    AudioUrl,
    DecoderLimits,
    FetchPolicy,
    InlineAudio,
    Pcm,
)
from audio.decoder_pool import DecoderPool
from audio.fetch import MediaFetcher
from tests.audio.origin import response, serving
from tests.audio.signals import chirp, decode, written

LIMITS = AudioLimits()
WAV = written(chirp(0.5, 16_000), 16_000, "WAV", "PCM_16")
TEXT = base64.b64encode(WAV).decode()


def load(*sources, **options):
    async def scenario():
        loader = AudioLoader(LIMITS, **options)
        try:
            return await asyncio.gather(*map(loader.load, sources))
        finally:
            await loader.aclose()

    return asyncio.run(scenario())


def test_every_inline_source_gives_the_same_clip():
    clips = load(
        InlineAudio(TEXT),
        InlineAudio(TEXT, "mp3"),  # a wrong declared format decides nothing
        InlineAudio(f"data:audio/mpeg;base64,{TEXT}"),
        AudioUrl(f"data:audio/wav;base64,{TEXT}"),
        AudioFile(io.BytesIO(WAV), "flac"),
    )
    assert clips == [decode(WAV, LIMITS)] * 5


def test_a_link_gives_the_same_clip():
    async def scenario():
        async def resolve(host, port):
            return ["127.0.0.1"]

        async with serving({"/a.mp3": response(WAV)}) as origin:
            policy = FetchPolicy(allowed_private_hosts=frozenset({f"media.test:{origin.port}"}))
            loader = AudioLoader(LIMITS, MediaFetcher(policy, LIMITS, resolver=resolve))
            pcm = await loader.load(AudioUrl(f"http://media.test:{origin.port}/a.mp3"))
            await loader.aclose()
            return pcm

    assert asyncio.run(scenario()) == decode(WAV, LIMITS)


def test_links_can_be_off():
    with pytest.raises(AudioError) as caught:
        load(AudioUrl("http://example.com/a.wav"))
    assert caught.value.code == "media_url_refused"


def test_event_loop_stays_alive_while_decoding():
    # LAME's VBR at 16 kHz holds a few frames that mpg123 complains of on stderr; only time is judged here.
    five_minutes = np.tile(chirp(10, 16_000), (30, 1))
    data = base64.b64encode(written(five_minutes, 16_000, "MP3")).decode()

    async def scenario():
        loader = AudioLoader(LIMITS)
        task = asyncio.create_task(loader.load(InlineAudio(data, "mp3")))
        worst, num_ticks = 0.0, 0
        while not task.done():
            started = time.perf_counter()
            await asyncio.sleep(0.005)
            worst = max(worst, time.perf_counter() - started - 0.005)
            num_ticks += 1
        await loader.aclose()
        return task.result(), worst, num_ticks

    pcm, worst, num_ticks = asyncio.run(scenario())
    assert pcm.duration_s == pytest.approx(300, abs=0.1)
    assert num_ticks > 5  # it did run beside the decode
    assert worst < 0.25


def test_workers_are_bounded(monkeypatch):
    running = most_running = 0
    really_decode = DecoderPool.decode

    def slow_decode(pool, file, *more):
        nonlocal running, most_running
        running += 1
        most_running = max(most_running, running)
        time.sleep(0.02)
        running -= 1
        return really_decode(pool, file, *more)

    monkeypatch.setattr(DecoderPool, "decode", slow_decode)
    assert len(load(*[AudioFile(io.BytesIO(WAV)) for _ in range(8)], num_cores=2)) == 8
    assert most_running == 2


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_workers_yield_to_the_event_loop(monkeypatch):
    """Or a long file on a machine with all cores busy would hold up everybody's answers."""
    niceness = []
    really_decode = DecoderPool.decode

    def recorded(pool, file, *more):
        samples = really_decode(pool, file, *more)
        niceness.append(os.getpriority(os.PRIO_PROCESS, 0))
        started = psutil.Process().children(recursive=True)
        niceness.extend(process.nice() for process in started if "audio.decoder_process" in process.cmdline())
        return samples

    monkeypatch.setattr(DecoderPool, "decode", recorded)
    load(AudioFile(io.BytesIO(WAV)))
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert niceness == [min(19, ours + 5)] * 3  # a thread, the host of the decoders, a decoder


def test_resampling_is_timed_where_it_happens():
    """In the decoder's own process: part of what decoding took, and nothing where nothing is resampled."""

    class Heard:
        def __init__(self):
            self.stages = {}

        def stage(self, name, began, ended):
            self.stages[name] = self.stages.get(name, 0) + ended - began

        def file(self, num_bytes, container):
            pass

    async def scenario(rate):
        loader, clip, long = AudioLoader(LIMITS), Heard(), Heard()
        data = written(chirp(60, rate), rate, "WAV", "PCM_16")
        await loader.load(AudioFile(io.BytesIO(data)), observer=clip)
        async for _ in loader.stream(io.BytesIO(data), LIMITS, 16_000 * 25, long):
            pass
        await loader.aclose()
        return clip.stages, long.stages

    for stages in asyncio.run(scenario(48_000)):
        assert 0.001 < stages["resample"] < stages["decode"]
    for stages in asyncio.run(scenario(16_000)):
        assert list(stages) == ["decode"]


def test_pcm_is_read_only_and_owns_its_samples():
    samples = np.ones(10, np.float32)
    pcm = Pcm(samples)
    samples[0] = 5
    assert pcm.samples[0] == 1
    assert pcm == Pcm(np.ones(10, np.float32))
    assert len(pcm.content_hash) == 64
    with pytest.raises(ValueError, match="read-only"):
        pcm.samples[0] = 0


@pytest.mark.parametrize("samples", [np.zeros(0, np.float32), np.zeros(3), np.zeros((2, 2), np.float32)])
def test_pcm_refuses_other_shapes(samples):
    with pytest.raises(ValueError, match="float32"):
        Pcm(samples)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AudioLimits(max_clip_bytes=0),
        lambda: AudioLimits(max_clip_seconds=float("nan")),
        lambda: AudioLimits(min_sample_rate=9_000, max_sample_rate=8_000),
        lambda: DecoderLimits(cpu_s=0),
        lambda: FetchPolicy(total_timeout_s=0),
        lambda: FetchPolicy(max_redirects=-1),
        lambda: FetchPolicy(allowed_domains="good.test"),
    ],
)
def test_wrong_limits_stop_the_start_up(make):
    with pytest.raises(ValueError, match=r"must"):
        make()


def test_public_names_and_imports():
    assert sorted(audio.__all__, key=str.lower) == sorted(dir_public(), key=str.lower)
    for path in Path(audio.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "engine", "model", "server", "configs"}


def dir_public():
    modules = {path.stem for path in Path(audio.__file__).parent.glob("*.py")} - {"segment"}
    return [name for name in vars(audio) if not name.startswith("_") and name not in modules]


def test_a_long_file_streams_in_windows():
    sound = chirp(7.3, 16_000)
    wav = written(sound, 16_000, "WAV", "FLOAT")

    async def scenario():
        loader = AudioLoader(LIMITS)
        try:
            windows = [window async for window in loader.stream(io.BytesIO(wav), LIMITS, 32_000)]
            left = loader.stream(io.BytesIO(wav), LIMITS, 32_000)
            await anext(left)
            await left.aclose()
            return windows
        finally:
            await loader.aclose()

    windows = asyncio.run(scenario())
    assert np.array_equal(np.concatenate([window.samples for window in windows]), sound[:, 0])
    assert all(window.num_samples <= 32_000 for window in windows)
