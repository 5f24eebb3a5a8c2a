"""What the HTTP process does with a clip before an engine hears it: how fast, and where its CPU time goes.

    python -m benchmarks.front clips      clips a second through the front alone; the engine's share of a real run
    python -m benchmarks.front health     GET /health while 64 requests stream and 16 long files upload

`clips`: the real application on a socket of this machine, round an engine that answers at once, and 16 clients that
each send a clip in a chat completion as soon as they are answered. Every request brings its clip as base64; wav is
16 kHz PCM, mp3 44.1 kHz, opus 48 kHz, which is what its decoder always gives. Stages are timed one by one in this
process, in CPU time. Then real servers answer with 32 tokens each about a clip of their own, which no cache has, and
the CPU time of their two processes is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile
import soxr

from audio import SAMPLE_RATE, AudioLimits, Pcm
from audio.decode import decode
from audio.resample import StreamResampler
from audio.source import write_inline
from benchmarks import health
from benchmarks.health import wait_until_healthy
from benchmarks.http_load import json_request, send
from benchmarks.long_file import make_recording, serving
from benchmarks.make_checkpoint import write_checkpoint
from benchmarks.null_engine import serve
from benchmarks.report import finish
from engine import channel
from engine.messages import AudioClip, EngineRequest, SamplingParams
from model.config import num_audio_tokens
from server.__main__ import BUNDLED_CHECKPOINT
from server.http.body import validate_json
from server.http.json_body import JsonReader
from server.prompt.builder import PromptBuilder
from server.prompt.chat_template import AUDIO, ChatTemplate, Turn
from server.prompt.tokenizer import Tokenizer
from server.requests.schema import ChatRequest
from tympan.load import closed_loop

SECONDS = (2.0, 10.0, 30.0)
RATES = {"wav": 16_000, "mp3": 44_100, "opus": 48_000}
CONTAINERS = {"wav": ("WAV", "PCM_16"), "mp3": ("MP3", None), "opus": ("OGG", "OPUS")}
QUESTION = "What does the person say?"
SHIFT = 1_111
"""Samples by which one clip begins later than the one before."""
REPEATS = 5
"""Of a stage; the fastest counts."""


def make_clip(seconds: float, kind: str, number: int = 0) -> bytes:
    """An encoded file of speech; no two numbers give the same."""
    samples = np.roll(make_recording(0.6, seed=0)[0], -SHIFT * number)[: int(seconds * SAMPLE_RATE)]
    container, codec = CONTAINERS[kind]
    file = io.BytesIO()
    resampled = soxr.resample(samples, SAMPLE_RATE, RATES[kind])
    soundfile.write(file, resampled, RATES[kind], format=container, subtype=codec)
    return file.getvalue()


def make_body(clip: bytes, output_tokens: int) -> dict[str, Any]:
    """A chat completion with a clip."""
    audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(clip).decode(), "format": "wav"}}
    return {
        "messages": [{"role": "user", "content": [audio, {"type": "text", "text": QUESTION}]}],
        "max_tokens": output_tokens,
        "ignore_eos": True,
    }


def drive(
    url: str, requests: Sequence[bytes], concurrency: int, groups: Sequence[Sequence[int]]
) -> tuple[float, list[float]]:
    """Send all requests. -> seconds, and CPU seconds of each group of processes meanwhile."""

    async def one(number: int) -> None:
        answer = await send(url, requests[number])
        assert answer.status == 200, f"HTTP {answer.status}"

    before = [sum(map(cpu_seconds, group)) for group in groups]
    started = time.perf_counter()
    asyncio.run(closed_loop(len(requests), concurrency, one))
    wall = time.perf_counter() - started
    return wall, [sum(map(cpu_seconds, group)) - then for group, then in zip(groups, before, strict=True)]


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, so far."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def with_decoders(pid: int) -> list[int]:
    """A server's HTTP process and all that it has started."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def through_the_front(clips: dict[tuple[float, str], bytes], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Clips a second with the null engine."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,))
    process.start()
    assert process.pid is not None
    url = f"http://127.0.0.1:{ours.recv()}"
    rows = []
    for (seconds, kind), clip in clips.items():
        request = json_request("/v1/chat/completions", make_body(clip, 1))
        drive(url, [request] * args.concurrency, args.concurrency, [])
        count = max(4 * args.concurrency, int(args.requests * 2 / seconds))
        wall, [cpu] = drive(url, [request] * count, args.concurrency, [with_decoders(process.pid)])
        rows.append(
            {
                "clip_seconds": seconds,
                "format": kind,
                "clips_per_s": count / wall,
                "cpu_ms_per_clip": 1000 * cpu / count,
                "stage_cpu_ms": stages(clip),
            }
        )
    ours.send("end")
    process.join()
    return rows


def taken(body: bytes) -> JsonReader:
    """A body as it comes in."""
    reader = JsonReader()
    for start in range(0, len(body), 1 << 16):
        reader.write(body[start : start + (1 << 16)])
    return reader


def stages(clip: bytes) -> dict[str, float]:
    """CPU milliseconds of one clip's way, each stage alone."""
    limits = AudioLimits()
    body = json.dumps(make_body(clip, 1)).encode()
    text = base64.b64encode(clip).decode()
    pcm = Pcm(decode(io.BytesIO(clip), limits))
    rate = soundfile.info(io.BytesIO(clip)).samplerate
    raw = soxr.resample(pcm.samples, SAMPLE_RATE, rate)
    folder = BUNDLED_CHECKPOINT
    prompts = PromptBuilder(Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder), 1283, 8192)
    num_tokens = num_audio_tokens(pcm.num_samples)
    samples = AudioClip(pcm.samples, pcm.content_hash, 5, num_tokens)
    prompt = prompts.chat([Turn("user", (AUDIO, QUESTION))], [num_tokens])
    request = EngineRequest("0" * 32, prompt.token_ids, SamplingParams(1), (samples,))
    took = {
        "parse": fastest(lambda: validate_json(ChatRequest, taken(body))),
        "base64": fastest(lambda: write_inline(text, io.BytesIO(), limits)),
        "decode_resample_hash": fastest(lambda: Pcm(decode(io.BytesIO(clip), limits))),
        "resample": fastest(lambda: resample(raw, rate)) if rate != SAMPLE_RATE else 0.0,
        "hash": fastest(lambda: Pcm(pcm.samples)),
        "render_tokenize": fastest(lambda: prompts.chat([Turn("user", (AUDIO, QUESTION))], [num_tokens])),
        "send": sending(request),
    }
    whole = took.pop("decode_resample_hash")
    return {"decode": max(0.0, whole - took["resample"] - took["hash"]), **took}


def resample(samples: np.ndarray[Any, Any], rate: int) -> None:
    """As the decoder does it: block by block."""
    resampler = StreamResampler(rate)
    for start in range(0, len(samples), 65_536):
        resampler.push(samples[start : start + 65_536])
    resampler.finish()


def sending(request: EngineRequest) -> float:
    """CPU milliseconds of writing a request to a pipe that somebody empties."""
    ours, theirs = multiprocessing.Pipe()

    def empty() -> None:
        for _ in range(REPEATS):
            channel.receive(theirs)  # type: ignore[arg-type]

    reader = threading.Thread(target=empty)
    reader.start()
    took = fastest(lambda: channel.send(ours, request))  # type: ignore[arg-type]
    reader.join()
    return took


def fastest(function: Callable[[], object]) -> float:
    """CPU milliseconds of this thread."""
    best = float("inf")
    for _ in range(REPEATS):
        started = time.thread_time()
        function()
        best = min(best, time.thread_time() - started)
    return 1000 * best


def engine_share(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A real server under the same clients: whose CPU time is it?"""
    bodies = [make_body(make_clip(10.0, "wav", number), 32) for number in range(32)]
    made = [json_request("/v1/chat/completions", body) for body in bodies]
    warm_up, requests = made[:8], made[8:]
    with serving(["--model", str(folder)]) as client:
        url = str(client.base_url)
        wait_until_healthy(client)
        drive(url, warm_up, 8, [])
        wall, [front, engine] = drive(url, requests, args.concurrency, server_pids())
    return {
        "checkpoint": name,
        "requests_per_s": len(requests) / wall,
        "front_cpu_ms_per_request": 1000 * front / len(requests),
        "engine_cpu_ms_per_request": 1000 * engine / len(requests),
        "engine_share_of_cpu": engine / (front + engine),
    }


def server_pids() -> tuple[list[int], list[int]]:
    """The server's HTTP process, which this process has started, with its decoders; and its engine's."""
    [front] = [child for child in psutil.Process().children() if "server" in child.cmdline()]
    engine = max((child.pid for child in front.children()), key=cpu_seconds)
    return [pid for pid in with_decoders(front.pid) if pid != engine], [engine]


def clips(args: argparse.Namespace) -> dict[str, Any]:
    """The first mode."""
    made = {(seconds, kind): make_clip(seconds, kind) for seconds in SECONDS for kind in RATES}
    rows = through_the_front(made, args)
    with ExitStack() as stack:
        small = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_checkpoint(small, "small", "bfloat16")
        shares = [engine_share("bundled", BUNDLED_CHECKPOINT, args), engine_share("small (60 M)", small, args)]
    return {"benchmark": "front", "concurrency": args.concurrency, "clips": rows, "engine": shares}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("clips", "health"))
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=400, help="clips of 2 s; fewer of longer ones")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--uploads", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10, help="of each upload")
    parser.add_argument("--seconds", type=float, default=40, help="how long uploads are waited for")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    finish({"clips": clips, "health": health.measure}[args.mode](args), args.output)


if __name__ == "__main__":
    main()
