"""Hostile clips and links against a real server while honest requests run: each gets its 400, nobody notices."""

from __future__ import annotations

import io
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile

from tests.integration.conftest import ServerProcess, input_audio, text, wav
from tests.reference import noise


def forged_wav(*, channels: int, sample_rate: int) -> bytes:
    """A RIFF header that claims more than it holds."""
    block = 2 * channels
    head = struct.pack("<HHIIHH", 1, channels, sample_rate, (sample_rate * block) & 0xFFFFFFFF, block, 16)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", 32000) + bytes(32000)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def flac_bomb(hours: int = 2) -> bytes:
    """Hours of silence in a few hundred kilobytes."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 16000, 1, format="FLAC") as file:
        for _ in range(60 * hours):
            file.write(np.zeros(16000 * 60, np.int16))
    return buffer.getvalue()


def url(address: str) -> dict[str, Any]:
    """A part that points elsewhere."""
    return {"type": "audio_url", "audio_url": {"url": address}}


HOSTILE: dict[str, Any] = {
    "not audio": lambda: input_audio(b"<html>no sound here</html>" * 50),
    "empty": lambda: input_audio(b""),
    "no samples": lambda: input_audio(wav(np.zeros(0, np.float32))),
    "truncated": lambda: input_audio(wav(noise(16000))[:40]),
    "300 channels": lambda: input_audio(forged_wav(channels=300, sample_rate=16000)),
    "10 MHz": lambda: input_audio(forged_wav(channels=1, sample_rate=10_000_000)),
    "bomb": lambda: input_audio(flac_bomb(), "flac"),
    "bad base64": lambda: {"type": "input_audio", "input_audio": {"data": "????", "format": "wav"}},
    "too short": lambda: input_audio(wav(noise(320))),
    "601 s": lambda: input_audio(wav(noise(601 * 4000), 4000)),
    "not a number": lambda: input_audio(wav(np.full(16000, np.nan, np.float32))),
    "metadata address": lambda: url("http://169.254.169.254/latest/meta-data"),
    "private address": lambda: url("http://10.0.0.1/a.wav"),
    "mapped address": lambda: url("http://[::ffff:10.0.0.1]/a.wav"),
    "decimal address": lambda: url("http://167772161/a.wav"),
    "nobody listens": lambda: url("http://127.0.0.1:9/a.wav"),
    "a file": lambda: url("file:///etc/passwd"),
    "an image": lambda: {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
}


def ask(server: ServerProcess, part: dict[str, Any]) -> Any:
    """One question about one part."""
    return server.http.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": [part, text("Well?")]}], "max_tokens": 8, "temperature": 0},
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_refused_by_name(name: str, reference_server: ServerProcess) -> None:
    started = time.monotonic()
    response = ask(reference_server, HOSTILE[name]())
    assert time.monotonic() - started < 15
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith("messages[0].content[0]")
    assert len(response.content) < 2048
    assert not any(leak in response.text for leak in ("0x", "Traceback", "/etc/", "site-packages"))


def test_honest_requests_do_not_notice(reference_server: ServerProcess) -> None:
    honest = input_audio(wav(noise(24_000, 11)))
    alone = ask(reference_server, honest).json()["choices"]
    memory = psutil.Process(reference_server.process.pid).memory_info().rss
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(ask, reference_server, make()) for make in HOSTILE.values()]
        good = [pool.submit(ask, reference_server, honest) for _ in range(6)]
        assert {future.result().status_code for future in bad} == {400}
        assert all(future.result().json()["choices"] == alone for future in good)
    assert psutil.Process(reference_server.process.pid).memory_info().rss - memory < 300 << 20


def test_a_wrong_declared_format_works(reference_server: ServerProcess) -> None:
    assert ask(reference_server, input_audio(wav(noise(16000)), "mp3")).status_code == 200
