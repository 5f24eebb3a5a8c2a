"""How long GET /health takes while a server on this machine is as busy as it can be.

A server of its own with the bundled checkpoint: `--streams` chat streams with a clip each, begun anew as they end,
and `--uploads` recordings of ten minutes, all sent to /v1/audio/transcriptions at one moment. Meanwhile a process of
its own asks for /health every 20 ms. The clients, which would be on other machines, run at a low priority; the one
that asks does not. Part of `benchmarks.front`.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

import httpx
import soundfile
import soxr

from audio import SAMPLE_RATE
from benchmarks.http_load import Answer, json_request, send, upload_request
from benchmarks.long_file import make_recording, serving
from tympan.load import make_wav, percentiles

INTERVAL_S = 0.02
IDLE_S = 1.0
"""How long the prober is alone, to compare with."""
MP3_RATE = 44_100
CLIENT_NICENESS = 10


def make_mp3(minutes: float) -> bytes:
    """Speech as most recordings come: 44.1 kHz, variable bit rate."""
    samples, _ = make_recording(minutes, seed=0)
    file = io.BytesIO()
    soundfile.write(file, soxr.resample(samples, SAMPLE_RATE, MP3_RATE, "LQ"), MP3_RATE, format="MP3")
    return file.getvalue()


def probe(url: str, results: Connection) -> None:
    """In a process of its own: GET /health every 20 ms until told to end, then send all times in seconds."""
    address = urlsplit(url)
    assert address.hostname is not None
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    times: list[tuple[float, float]] = []
    with socket.create_connection((address.hostname, address.port or 80)) as connection:
        due = time.monotonic()
        while not results.poll():
            started = time.monotonic()
            connection.sendall(request)
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
            times.append((started, time.monotonic() - started))
            due = max(due + INTERVAL_S, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
    results.send(times)


async def load(url: str, uploads: Sequence[bytes], args: argparse.Namespace) -> dict[str, Any]:
    """Streams, then uploads on top of them. -> when the uploads began and ended, and what was done."""
    streamed = [Answer() for _ in range(args.streams)]
    uploaded = [Answer() for _ in uploads]
    streams = [asyncio.create_task(_stream(url, number, streamed[number])) for number in range(args.streams)]
    while not all(answer.num_events > 1 for answer in streamed):
        await asyncio.sleep(0.05)
    tokens_before = sum(answer.num_events for answer in streamed)
    began = time.monotonic()
    sending = [asyncio.create_task(send(url, *pair)) for pair in zip(uploads, uploaded, strict=True)]
    await asyncio.wait(sending, timeout=args.seconds)
    ended = time.monotonic()
    num_tokens = sum(answer.num_events for answer in streamed) - tokens_before
    for task in (*streams, *sending):
        task.cancel()
    await asyncio.gather(*streams, *sending, return_exceptions=True)
    return {
        "began": began,
        "ended": ended,
        "uploads_answered": sum(answer.status == 200 for answer in uploaded),
        "streamed_tokens_per_s": num_tokens / (ended - began),
    }


async def _stream(url: str, number: int, answer: Answer) -> None:
    audio = {"type": "input_audio", "input_audio": {"data": make_wav(2.0, number), "format": "wav"}}
    body = {
        "messages": [{"role": "user", "content": [audio, {"type": "text", "text": "What is said?"}]}],
        "stream": True,
        "ignore_eos": True,
        "max_tokens": 2000,
    }
    request = json_request("/v1/chat/completions", body)
    while True:
        await send(url, request, answer)


def generate_load(url: str, mp3: bytes, args: argparse.Namespace, results: Connection) -> None:
    """In a process of its own: all clients but the prober."""
    os.nice(CLIENT_NICENESS)
    request = upload_request("/v1/audio/transcriptions", mp3, {"model": "tympan-tiny"})
    results.send(asyncio.run(load(url, [request] * args.uploads, args)))


def wait_until_healthy(client: httpx.Client) -> None:
    """A server says its address a moment before it listens."""
    for _ in range(100):
        try:
            if client.get("/health").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the server does not answer")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    mp3 = make_mp3(args.minutes)
    context = multiprocessing.get_context("spawn")
    load_end, load_results = context.Pipe()
    probe_end, probe_results = context.Pipe()
    with serving([]) as client:
        url = str(client.base_url)
        prober = context.Process(target=probe, args=(url, probe_results))
        loader = context.Process(target=generate_load, args=(url, mp3, args, load_results))
        wait_until_healthy(client)
        prober.start()
        time.sleep(IDLE_S)
        loader.start()
        done = load_end.recv()
        probe_end.send(None)
        times = probe_end.recv()
        loader.join()
        prober.join()
    began, ended = done.pop("began"), done.pop("ended")
    busy = [1000 * took for started, took in times if began <= started < ended]
    idle = [1000 * took for started, took in times if started < times[0][0] + IDLE_S]
    return {
        "benchmark": "health",
        "streams": args.streams,
        "uploads": args.uploads,
        "upload_bytes": len(mp3),
        "busy_s": ended - began,
        **done,
        "health_ms": {**percentiles(busy), "max": max(busy), "count": len(busy)},
        "idle_health_ms": {**percentiles(idle), "max": max(idle), "count": len(idle)},
        "load_average": os.getloadavg(),
    }
