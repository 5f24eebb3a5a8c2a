"""Hostile requests against a real server: what each gets, how soon, and what memory its processes take for it.

A server of its own with the bundled checkpoint and a key. Every input must be refused with a 4xx (501 for encodings
nobody has, 503 in a crowd), or the connection closed; after each the server must be alive, and at the end answer.
Memory is what all its processes have, libraries aside, sampled while a case runs, beside what they had after honest
requests. Part of the security documentation: SECURITY.md.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.abuse import Memory
from benchmarks.report import finish
from benchmarks.servers import Recipe, running
from tests.audio.test_hostile_files import flac_of_silence

KEY = "abuse"
MIB = 1 << 20
LIMIT_S = 60.0
"""For one case: the longest deadline of the server is 30 s."""
SAMPLE_S = 0.02
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    f"Authorization: Bearer {KEY}\r\n"
)
CLOSED = 0
"""Instead of a status: the connection was closed without an answer."""


@dataclass(frozen=True)
class Case:
    """One hostile request: `send` makes it and returns the status."""

    group: str
    name: str
    send: Callable[[str], int]


def raw(data: bytes, *, endless: bytes = b"", pause_s: float = 0.0) -> Callable[[str], int]:
    """Bytes on a socket; then `endless` again and again until the server answers or closes."""

    def send(url: str) -> int:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=LIMIT_S) as sock:
            sender = threading.Thread(target=_send_all, args=(sock, data, endless, pause_s), daemon=True)
            sender.start()
            try:
                answer = sock.recv(65_536)
            except ConnectionError:
                return CLOSED
            return int(answer.split(b" ", 2)[1]) if answer else CLOSED

    return send


def _send_all(sock: socket.socket, data: bytes, endless: bytes, pause_s: float) -> None:
    try:
        sock.sendall(data)
        while endless:
            sock.sendall(endless)
            time.sleep(pause_s)
    except OSError:
        pass


def post(body: Callable[[], bytes], path: str = "/v1/chat/completions") -> Callable[[str], int]:
    """A JSON body, made when it is sent."""

    def send(url: str) -> int:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        try:
            answer = httpx.post(url + path, content=body(), headers=headers, timeout=LIMIT_S, trust_env=False)
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            return CLOSED
        return answer.status_code

    return send


def at_once(count: int, send: Callable[[str], int]) -> Callable[[str], int]:
    """So many clients; the status that is no refusal, if there is one."""

    def send_all(url: str) -> int:
        with ThreadPoolExecutor(count) as pool:
            statuses = list(pool.map(lambda _: send(url), range(count)))
        return next((status for status in statuses if status < 400), statuses[0])

    return send_all


def chat(*content: Any, **more: Any) -> Callable[[], bytes]:
    """A conversation of one message."""
    return lambda: json.dumps({"messages": [{"role": "user", "content": list(content)}], **more}).encode()


def form(fields: bytes, path: str = "/v1/audio/transcriptions") -> Callable[[str], int]:
    """A multipart body as it stands."""
    head = f"POST {path} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
    head += f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(fields)}\r\n\r\n"
    return raw(head.encode() + fields)


def text(content: str) -> dict[str, str]:
    """A part."""
    return {"type": "text", "text": content}


def clip(data: bytes) -> dict[str, Any]:
    """A part."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def wav(rate: int, channels: int, num_bytes: int, claimed: int | None = None) -> bytes:
    """A file of 16 bits with a header that may lie."""
    size = num_bytes if claimed is None else claimed
    head = struct.pack("<HHIIHH", 1, channels, rate, (rate * channels * 2) & 0xFFFFFFFF, (channels * 2) & 0xFFFF, 16)
    riff = struct.pack("<I", (36 + size) & 0xFFFFFFFF)
    return (
        b"RIFF"
        + riff
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + head
        + b"data"
        + struct.pack("<I", size)
        + bytes(num_bytes)
    )


def without_key() -> Iterator[Case]:
    """Every way in, and a body that never ends behind it."""
    paths = (
        "/v1/chat/completions",
        "/v1/models",
        "/openapi.json",
        "/docs",
        "/metrics",
        "//v1/models",
        "/health/",
    )
    more = ("/%76%31/models", "/health/../v1/models", "/v1/models;/health", "http://h/health", "/health%00", "*")
    for path in (*paths, *more):
        for method in ("GET", "POST", "OPTIONS"):
            yield Case(
                "no key", f"{method} {path}", raw(f"{method} {path} HTTP/1.1\r\nHost: /health\r\n\r\n".encode())
            )
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    yield Case(
        "no key", "endless body", raw((head + "Transfer-Encoding: chunked\r\n\r\n").encode(), endless=_chunk(MIB))
    )
    yield Case("no key", "1 TB announced", raw((head + f"Content-Length: {10**12}\r\n\r\n").encode()))
    yield Case("no key", "wrong key", raw((head + f"Authorization: Bearer {KEY}x\r\n\r\n").encode()))


def _chunk(size: int) -> bytes:
    return f"{size:x}\r\n".encode() + b" " * size + b"\r\n"


def on_the_wire() -> Iterator[Case]:
    """Headers, framings and clients that take their time."""
    get = f"GET /v1/models HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\n"
    yield Case("header", "10 MB value", raw((get + "X: " + "x" * 10 * MIB).encode() + b"\r\n\r\n"))
    yield Case("header", "200 kB value", raw((get + "X: " + "x" * 200_000).encode() + b"\r\n\r\n"))
    yield Case("header", "endless", raw(get.encode(), endless=b"X: " + b"x" * 1000 + b"\r\n"))
    yield Case(
        "header", "5,000 fields", raw((get + "".join(f"X{k}: y\r\n" for k in range(5000))).encode() + b"\r\n")
    )
    yield Case("header", "10 MB target", raw(b"GET /" + b"x" * 10 * MIB + b" HTTP/1.1\r\nHost: h\r\n\r\n"))
    for name, lengths in (
        ("two lengths", "Content-Length: 1\r\nContent-Length: 2"),
        ("negative length", "Content-Length: -1"),
        ("gzip transfer", "Transfer-Encoding: gzip"),
        ("bad chunk", "Transfer-Encoding: chunked"),
    ):
        yield Case("header", name, raw((HEAD + lengths + "\r\n\r\nzz\r\n").encode()))
    yield Case("header", "TLS", raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)))
    yield Case("slow", "header", raw(get.encode(), endless=b"X: y\r\n", pause_s=0.5))
    body = (HEAD + "Content-Length: 100000\r\n\r\n").encode()
    yield Case("slow", "body", raw(body, endless=b" ", pause_s=0.5))
    yield Case("slow", "nothing", raw(b""))
    yield Case(
        "body", "endless chunks", raw((HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode(), endless=_chunk(MIB))
    )
    yield Case("body", "70 MB announced", raw((HEAD + f"Content-Length: {70 * MIB}\r\n\r\n").encode()))


def bodies() -> Iterator[Case]:
    """JSON that costs more to read than to send."""
    one = b'{"messages": [{"role": "user", "content": "x"}], "x": '
    makers: dict[str, Callable[[], bytes]] = {
        "open arrays": lambda: b"[" * 60 * MIB,
        "open objects": lambda: b'{"a":' * 12 * MIB,
        "values": lambda: one + b"[" + b"0," * 30 * MIB + b"0]}",
        "arrays": lambda: one + b"[" + b"[]," * 20 * MIB + b"0]}",
        "objects": lambda: one + b"[" + b"{}," * 20 * MIB + b"0]}",
        "digits": lambda: one + b"9" * 60 * MIB + b"}",
        "no end": lambda: one + b'"' + b"x" * 60 * MIB,
        "white space": lambda: b'{"messages": ' + b" " * 60 * MIB + b"[]}",
        "no UTF-8": lambda: b'{"messages": "' + b"\xff" * 60 * MIB + b'"}',
        "objects below the limit": lambda: one[:-5] + b'"messages": [' + b'{"a":1},' * 49_000 + b"0]}",
    }
    for name, make in makers.items():
        yield Case("json", name, post(make))
    parts = [{"type": "z"}] * 4000
    yield Case("json", "40,000 bad parts", post(chat(*parts * 10)))
    yield Case("json", "n = 10^9", post(chat(text("x"), n=10**9)))
    yield Case(
        "json",
        "5,000 messages",
        post(lambda: json.dumps({"messages": [{"role": "user", "content": "x"}] * 5000}).encode()),
    )
    yield Case("prompt", "60 MB of words", post(chat(text("word " * 12 * MIB))))
    yield Case("prompt", "60 MB without a space", post(chat(text("x" * 60 * MIB))))
    yield Case("prompt", "a million control tokens", post(chat(text("<|AUDIO|>" * 1_000_000))))
    raw_prompt = {"prompt": "<|audio_bos|><|AUDIO|><|audio_eos|>" * 100_000}
    yield Case(
        "prompt", "placeholders without clips", post(lambda: json.dumps(raw_prompt).encode(), "/v1/completions")
    )


def constraints() -> Iterator[Case]:
    """Sources that compilers of grammars choke on."""
    for pattern in ("(((a{0,100}){0,100}){0,100}){0,100}", "(" * 10_000, "[" * 10_000):
        yield Case("grammar", pattern[:20], post(chat(text("x"), structured_outputs={"regex": pattern})))
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(90):
        deep = {"type": "array", "items": deep, "minItems": 100, "maxItems": 1000}
    loop = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    for name, schema in (("deep", deep), ("loop", loop), ("type 7", {"type": 7})):
        asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        yield Case("grammar", f"schema: {name}", post(chat(text("x"), response_format=asked)))


def clips() -> Iterator[Case]:
    """Audio that is not what it says; the decoders' own corpus is tests/audio's."""
    for name, data in (
        ("empty", b""),
        ("no audio", b"no audio at all" * 1000),
        ("one sample", wav(16_000, 1, 2)),
        ("655,350 Hz", wav(655_350, 8, MIB)),
        ("255 channels", wav(16_000, 255, MIB)),
        ("4 GB claimed", wav(16_000, 1, 1000, 0xFFFFFFFF)[:100]),
        ("11 minutes", wav(16_000, 1, 660 * 32_000)),
        ("26 MiB", wav(48_000, 2, 26 * MIB)),
    ):
        yield Case("audio", name, post(chat(clip(data))))
    yield Case("audio", "1,000 clips of a sample", post(chat(*[clip(wav(16_000, 1, 2))] * 1000)))
    yield Case("audio", "16 clips of 90 s", post(chat(*[clip(wav(8_000, 1, 90 * 16_000))] * 16)))
    for url in (
        "http://127.0.0.1:1/",
        "http://169.254.169.254/",
        "http://[::1]/",
        "file:///etc/passwd",
        "ftp://a/b",
    ):
        yield Case("audio", url, post(chat({"type": "audio_url", "audio_url": {"url": url}})))


def crowds() -> Iterator[Case]:
    """What is refused, many times at once."""
    sound, words = chat(clip(wav(16_000, 1, 24 * MIB)))(), chat(text("word " * MIB))()
    yield Case("crowd", "8 bodies of 34 MB", at_once(8, post(lambda: sound)))
    yield Case("crowd", "32 bodies of 5 MB of words", at_once(32, post(lambda: words)))
    smile = json.dumps(
        {"messages": [{"role": "user", "content": "word " * MIB + "\U0001f600"}]}, ensure_ascii=False
    ).encode()
    yield Case("crowd", "32 bodies of words, a smile", at_once(32, post(lambda: smile)))
    values = b'{"messages": [' + b'{"role":"user","content":"%b\\ud83d\\ude00"},' % (b"x" * 30_000) * 250 + b"0]}"
    yield Case("crowd", "32 bodies of 250 messages", at_once(32, post(lambda: values)))
    ids = json.dumps({"prompt": [[10**6] * 4000] * 70}).encode()
    yield Case("crowd", "32 bodies of 280,000 numbers", at_once(32, post(lambda: ids, "/v1/completions")))
    silence = base64.b64encode(flac_of_silence(hours=10)).decode()
    part = {"type": "input_audio", "input_audio": {"data": silence, "format": "flac"}}
    bomb = chat(part)()
    yield Case("crowd", "16 times 10 hours of FLAC", at_once(16, post(lambda: bomb)))
    head = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n'
    field = head + b"y" * (MIB - 1000) + b"\r\n--b--\r\n"
    yield Case("crowd", "64 forms with 1 MB of fields", at_once(64, form(field)))


def forms() -> Iterator[Case]:
    """Uploads that are no forms."""
    part = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    yield Case("form", "129 parts", form((part + b"y\r\n") * 129 + b"--b--\r\n"))
    yield Case("form", "8 MB field", form(part + b"y" * 8 * MIB + b"\r\n--b--\r\n"))
    yield Case("form", "two files", form((file + b"y\r\n") * 2 + b"--b--\r\n"))
    yield Case("form", "no end", form(file + b"y" * MIB))
    yield Case("form", "8 MB header", form(b"--b\r\nX: " + b"y" * 8 * MIB + b"\r\n\r\n--b--\r\n"))
    yield Case("form", "60 MB of nothing", form(file + bytes(60 * MIB) + b"\r\n--b--\r\n"))
    yield Case("form", "no boundary", form(b"y" * MIB))


class Resident:
    """The memory of the server's processes: now, and the most while a block runs."""

    def __init__(self, url: str) -> None:
        port = int(url.rpartition(":")[2])
        listening = [found for found in psutil.net_connections("tcp") if found.laddr and found.laddr.port == port]
        self._memory = Memory(next(found.pid for found in listening if found.pid and found.status == "LISTEN"))

    def mb(self) -> float:
        """Now."""
        return self._memory.now() * MIB / 1e6

    def peak_of(self, work: Callable[[], int]) -> tuple[int, float]:
        """-> what `work` returns, and the most that was resident."""
        ended, seen = threading.Event(), [self.mb()]

        def sample() -> None:
            while not ended.wait(SAMPLE_S):
                seen.append(self.mb())

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            return work(), max(seen)
        finally:
            ended.set()
            thread.join()


def check_alive(url: str) -> None:
    """Raises RuntimeError unless a good request is answered."""
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=LIMIT_S, trust_env=False)
    if answer.status_code != 200:
        raise RuntimeError(f"a good request got {answer.status_code}")


def warm_up(url: str) -> None:
    """Honest requests, so that what is started with the first of a kind is there: decoders, compiler of grammars."""
    for body in (
        chat(text("Hi"), clip(wav(16_000, 1, 64_000)), max_tokens=4),
        chat(text("Hi"), structured_outputs={"regex": "a{2,9}"}, max_tokens=4),
    ):
        for _ in range(3):
            if post(body)(url) != 200:
                raise RuntimeError("an honest request was refused")


def run(cases: Sequence[Case], url: str) -> dict[str, Any]:
    """All cases, one after the other. -> rows and sums."""
    resident = Resident(url)
    warm_up(url)
    base = resident.mb()
    rows = []
    for case in cases:
        started = time.perf_counter()
        status, peak = resident.peak_of(lambda case=case: case.send(url))
        seconds = time.perf_counter() - started
        rows.append(
            {
                "group": case.group,
                "name": case.name,
                "status": status,
                "seconds": round(seconds, 3),
                "peak_growth_mb": round(peak - base),
            }
        )
        print(f"{case.group:8} {case.name:28} {status:4} {seconds:7.3f} s  +{peak - base:.0f} MB", file=sys.stderr)
        if httpx.get(f"{url}/health", timeout=LIMIT_S, trust_env=False).status_code != 200:
            raise RuntimeError(f"the server did not survive: {case.group}, {case.name}")
    check_alive(url)
    quick = [row for row in rows if row["group"] != "slow"]
    return {
        "num_cases": len(rows),
        "statuses": dict(Counter(str(row["status"]) for row in rows)),
        "not_refused": [
            row for row in rows if not (row["status"] in (CLOSED, 501, 503) or 400 <= row["status"] < 500)
        ],
        "slowest": max(quick, key=lambda row: row["seconds"]),
        "slow_clients_cut_after_s": {row["name"]: row["seconds"] for row in rows if row["group"] == "slow"},
        "peak_growth_mb": max(row["peak_growth_mb"] for row in rows),
        "growth_at_the_end_mb": round(resident.mb() - base),
        "rows": rows,
    }


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="", help="a regex on group and name")
    args = parser.parse_args()
    sources = (without_key(), bodies(), constraints(), clips(), forms(), crowds(), on_the_wire())
    cases = [case for source in sources for case in source if re.search(args.only, f"{case.group} {case.name}")]
    recipe = Recipe(
        "tympan", (sys.executable, "-m", "server", "--api-key", KEY, "--host", "127.0.0.1", "--port"), "/ready"
    )
    with running(recipe) as server:
        result = run(cases, server.url)
    finish({"benchmark": "abuse over HTTP", **result}, args.output)


if __name__ == "__main__":
    main()
