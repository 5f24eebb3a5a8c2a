"""Every hostile audio input that we know of, against the real HTTP process while honest requests go on.

The engine is null (`benchmarks.null_engine`), so all that is measured is the front: the status and code of each
input, the time until its refusal, how far the memory of the server and its decoders rises over what it is after
honest requests (libraries aside, sampled every 20 ms), and what honest clients notice. Origins listen on loopback,
which the server is told to allow for them alone. Anything but a 400 for one of the inputs ends the run with status
1.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gzip
import json
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.front import QUESTION, make_body, make_clip
from benchmarks.null_engine import serve
from benchmarks.report import finish
from configs.settings import Settings
from tests.audio.origin import Origin, redirect, response
from tests.audio.signals import chirp, encoded, silent_film, written
from tests.audio.test_hostile_files import UNREADABLE, flac_of_silence, index_bomb, opus_of_silence, wav_header
from tympan.load import percentiles

MIB = 1 << 20
CONCURRENCY = 8
SETTLE_S = 0.1
"""Before each input: a sample may be under way that still belongs to the one before."""
INSIDE = (
    *(
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "017700000001",
        "0",
        "localhost",
        "127。0。0。1",
        "10.0.0.1",
    ),
    *("169.254.169.254", "100.100.100.200", "168.63.129.16", "10.0.0.1", "[::1]", "[::]", "[::ffff:7f00:1]"),
    *("[::127.0.0.1]", "[2002:7f00:1::1]", "[64:ff9b::7f00:1]", "[fd00::1]", "[fe80::1]", "[fe80::1%25eth0]"),
)
MALFORMED = (
    *(
        "http://user:pass@a.test/",
        "http://a.test\\@127.0.0.1/",
        "http://a.test:99999/",
        "gopher://a.test/",
        "http://",
    ),
    *(
        "ftp://a.test/",
        "http://a.test/\r\nX: y",
        "http://a.test/" + "a" * 9_000,
        "javascript:x",
        "file:///etc/passwd",
    ),
    *(
        "data:audio/wav,plain",
        "data:;base64,????",
        "data:" + "a/" * 500_000 + ";base64,AAAA",
        "data:audio/wav;base64,",
    ),
)


def files() -> dict[str, bytes]:
    """Bytes that are no audio, lie about it, or are far too much of it."""
    stereo = chirp(0.5, 48_000, channels=2)
    found = {name: data for name, (data, _) in UNREADABLE.items() if data}
    for rate, channels, bits in ((0, 1, 16), (10**7, 1, 16), (2**32 - 1, 1, 16), (16_000, 0, 16), (16_000, 255, 16),
                                 (16_000, 65_535, 16), (16_000, 1, 0)):  # fmt: skip
        header = wav_header(rate=rate, channels=channels, bits=bits)
        found[f"wav of {rate} Hz, {channels} channels, {bits} bits"] = header + bytes(24_000)
    found["not a number"] = written(np.full((16_000, 1), np.nan, np.float32), 16_000, "WAV", "FLOAT")
    found["film without sound"] = silent_film()
    found["10 hours of FLAC"] = flac_of_silence(hours=10)
    unknown = bytearray(flac_of_silence(hours=2))
    unknown[21] &= 0xF0
    unknown[22:26] = bytes(4)
    found["2 hours of FLAC that do not say so"] = bytes(unknown)
    found["an hour of Opus"] = opus_of_silence(minutes=60)
    found["index of 2^30 samples"] = index_bomb()
    found["mp3, then 24 MiB of nothing"] = written(stereo, 48_000, "MP3")[:400] + bytes(24 * MIB)
    found["24 MiB of tag"] = b"ID3\x04\x00\x00\x0b\x7f\x7f\x7f" + bytes(24 * MIB)
    found["a million chunks"] = b"RIFF\xff\xff\xff\xffWAVE" + b"junk\x00\x00\x00\x00" * 10**6
    found["nested boxes"] = b"\x00\x00\x00\x18ftypisom" + bytes(12) + b"\x7f\xff\xff\xffmoov" * 500_000
    found["nested elements"] = (
        b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67" + b"\x01" + b"\xff" * 7 + b"\x16\x54\xae\x6b\x8f" * 200_000
    )
    page = written(stereo, 48_000, "OGG", "VORBIS")[:58]
    found["thousands of streams"] = b"".join(
        page[:14] + number.to_bytes(4, "little") + page[18:] for number in range(50_000)
    )
    found["iamf"] = b"\x00\x00\x00\x18ftypiamf" + np.random.default_rng(0).bytes(100_000)
    found["cut aac"] = encoded(stereo, 48_000, "mp4", "aac")[:-3_000]
    return found


def texts() -> dict[str, str]:
    """What stands where base64 should."""
    return {
        "34 MB of A and a star": "A" * (34 * 10**6) + "*",
        "34 MB of blanks": " " * (34 * 10**6),
        "34 MB of percent signs": "%3D" * 11_000_000,
        "20 MB that is not ASCII": "é" * 10_000_000,
        "padding": "=" * 1000,
        "nothing": "",
    }


async def endless(writer: asyncio.StreamWriter, head: bytes, piece: bytes, pause_s: float = 0.0) -> None:
    """Write until the other side hangs up."""
    writer.write(head)
    while True:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause_s)


async def silent(_: asyncio.StreamWriter) -> None:
    """Never answer."""
    await asyncio.sleep(60)


def origin_scripts() -> dict[str, Any]:
    """Paths that do not behave. The slow ones last until the server's own deadline."""
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return {
        "/endless": lambda writer: endless(writer, chunked, b"2710\r\n" + bytes(10_000) + b"\r\n"),
        "/slow-body": lambda writer: endless(writer, chunked, b"1\r\nx\r\n", 0.2),
        "/slow-head": lambda writer: endless(writer, b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.2),
        "/hints": lambda writer: endless(writer, b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.01),
        "/silent": silent,
        "/gzip": response(gzip.compress(bytes(64 * MIB)), "200 OK", "Content-Encoding: gzip"),
        "/headers": response(b"x", "200 OK", *(f"X-{number}: y" for number in range(100_000))),
        "/header": response(b"x", "200 OK", "X: " + "y" * 8_000_000),
        "/loop": redirect("/loop"),
        "/inside": redirect("http://169.254.169.254/latest/meta-data"),
        "/local": redirect("file:///etc/passwd"),
        "/short": b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\nConnection: close\r\n\r\nshort",
        "/huge": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        "/teapot": response(b"secret", "418 secret"),
        "/html": response(b"<html>" * 1000),
        "/bomb": response(flac_of_silence(hours=10)),
    }


def part_of_url(url: str) -> dict[str, Any]:
    """An audio part."""
    return {"type": "audio_url", "audio_url": {"url": url}}


def part_of_text(data: str) -> dict[str, Any]:
    """An audio part."""
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def request_of(*parts: dict[str, Any]) -> bytes:
    """The body of a chat completion with these parts."""
    content = [*parts, {"type": "text", "text": QUESTION}]
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


def hostile_requests(port: int, folder: Path) -> dict[str, bytes]:
    """Name -> body."""
    tiny = base64.b64encode(written(np.zeros((400, 1), np.float32), 16_000, "WAV")).decode()
    found = {
        f"file: {name}": request_of(part_of_text(base64.b64encode(data).decode())) for name, data in files().items()
    }
    found |= {f"text: {name}": request_of(part_of_text(text)) for name, text in texts().items()}
    found |= {f"link: {host}": request_of(part_of_url(f"http://{host}/a.wav")) for host in INSIDE}
    found |= {f"link: {link[:40]!r}": request_of(part_of_url(link)) for link in MALFORMED}
    found |= {
        f"origin: {path}": request_of(part_of_url(f"http://127.0.0.1:{port}{path}")) for path in origin_scripts()
    }
    for name in ("../secret", "link", "pipe", "missing", "%2e%2e/secret", ""):
        found[f"local: {name}"] = request_of(part_of_url(f"file://{folder}/{name}"))
    found["1,000 clips"] = request_of(*[part_of_text(tiny)] * 1000)
    return found


class Memory(threading.Thread):
    """Samples the memory of a server and its decoders.

    Not the pages of libraries: how much of these counts here depends on who else on this machine has them mapped.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.server = psutil.Process(pid)
        self.peak = 0.0
        self.stopped = threading.Event()

    def now(self) -> float:
        """MiB."""
        total = 0
        try:
            children = self.server.children(recursive=True)
        except psutil.NoSuchProcess:
            return 0.0
        for process in (self.server, *children):
            try:
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            except OSError:
                continue  # a decoder that has just ended
            total += sum(map(int, re.findall(r"^Pss_(?:Anon|Shmem): +(\d+)", rollup, re.MULTILINE)))
        return total / 1024

    def run(self) -> None:
        while not self.stopped.wait(0.02):
            self.peak = max(self.peak, self.now())


async def measure_all(
    client: httpx.AsyncClient, requests: dict[str, bytes], honest: bytes, memory: Memory
) -> dict[str, Any]:
    """First each by itself, the slow origins side by side; then all at once, among honest requests."""
    for _ in range(64):
        await ask(client, honest)
    before = memory.now()
    memory.peak = before
    memory.start()
    alone = []
    for name in requests:
        if name not in SLOW:
            await asyncio.sleep(SETTLE_S)
            at_first = memory.peak = memory.now()
            row = await one(client, name, requests[name])
            alone.append({**row, "growth_mib": round(memory.peak - at_first, 1)})
    alone += await asyncio.gather(*(one(client, name, requests[name]) for name in SLOW))
    settled = memory.now()
    waits: list[float] = []
    failed: Counter[int] = Counter()
    over = asyncio.Event()

    async def be_honest() -> None:
        while not over.is_set():
            started = time.monotonic()
            answer = await ask(client, honest)
            waits.append(1000 * (time.monotonic() - started))
            failed[answer.status_code] += answer.status_code != 200

    clients = [asyncio.create_task(be_honest()) for _ in range(2)]
    slots = asyncio.Semaphore(CONCURRENCY)

    async def among_others(name: str) -> dict[str, Any]:
        async with slots:
            return await one(client, name, requests[name])

    together = await asyncio.gather(*(among_others(name) for name in requests if name not in SLOW))
    over.set()
    await asyncio.gather(*clients)
    memory.stopped.set()
    fast = [row for row in alone if row["name"] not in SLOW]
    return {
        "num_inputs": len(alone),
        "outcomes": dict(Counter(f"{row['status']} {row['code']}" for row in alone).most_common()),
        "memory_mib": {
            "before": before,
            "most_growth_by_one": max(row["growth_mib"] for row in fast),
            "kept_after_all": settled - before,
            "growth_together": memory.peak - before,
        },
        "dearest": sorted(fast, key=lambda row: -row["growth_mib"])[:5],
        "slowest": sorted(fast, key=lambda row: -row["seconds"])[:5],
        "worst_s": max(row["seconds"] for row in fast),
        "worst_s_by_deadline_of_a_fetch": max(row["seconds"] for row in alone),
        "worst_s_together": max(row["seconds"] for row in together),
        "honest_meanwhile": {"num": len(waits), "failed": failed.total(), "ms": percentiles(waits)},
        "not_refused": [row for row in (*alone, *together) if row["status"] != 400],
        "inputs": alone,
    }


SLOW = tuple(f"origin: /{name}" for name in ("slow-body", "slow-head", "hints", "silent"))


async def ask(client: httpx.AsyncClient, body: bytes) -> httpx.Response:
    """A chat completion."""
    return await client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})


async def one(client: httpx.AsyncClient, name: str, body: bytes) -> dict[str, Any]:
    """One input."""
    started = time.monotonic()
    answer = await ask(client, body)
    took = time.monotonic() - started
    error = answer.json().get("error") or {}
    return {"name": name, "status": answer.status_code, "code": error.get("code"), "seconds": round(took, 3)}


async def run(settings_of: Callable[[int, Path], Settings]) -> dict[str, Any]:
    """Origins here, the server in a process of its own."""
    origin = Origin(origin_scripts())
    listener = await asyncio.start_server(origin.handle, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    with tempfile.TemporaryDirectory() as place:
        folder = make_folder(Path(place))
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, settings_of(port, folder)))
        process.start()
        assert process.pid is not None
        url = f"http://127.0.0.1:{await asyncio.to_thread(ours.recv)}"
        try:
            honest = json.dumps(make_body(make_clip(10.0, "mp3"), 1)).encode()
            async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=600) as client:
                return await measure_all(client, hostile_requests(port, folder), honest, Memory(process.pid))
        finally:
            ours.send("end")
            await asyncio.to_thread(process.join, 60)
            listener.close()


def make_folder(place: Path) -> Path:
    """For file: URLs: a secret beside it, and ways there."""
    (place / "media").mkdir()
    (place / "secret").write_bytes(b"secret")
    (place / "media" / "link").symlink_to(place / "secret")
    os.mkfifo(place / "media" / "pipe")
    return place / "media"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = asyncio.run(
        run(
            lambda port, folder: Settings(
                allowed_private_media_hosts=(f"127.0.0.1:{port}",), allowed_local_media_path=folder
            )
        )
    )
    finish({"benchmark": "abuse", **result}, args.output)
    sys.exit(1 if result["not_refused"] or result["honest_meanwhile"]["failed"] else 0)


if __name__ == "__main__":
    main()
