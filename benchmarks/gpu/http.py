"""A real server in processes of its own, over a socket: first alone with one request at a time, then open loops.

Time to the first token is from the first byte of the request to the first event with text, by a client on the same
machine. Every clip is new to the server.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks import load
from benchmarks.gpu.journal import Journal, Unavailable
from benchmarks.gpu.shapes import Shape

ROOT = Path(__file__).resolve().parent.parent.parent
START_LIMIT_S = 240.0
END_LIMIT_S = 20.0
IDLE_TOKENS = 8
WARM_UP = 3
IDLE_CLIPS_S = (30.0, 2.0)
FIRST_MEASURED_SEED = 100_000


def run(journal: Journal, shape: Shape, device: torch.device, folder: Path) -> None:
    """All cells, on one server."""
    lengths = [min(seconds, shape.clip_seconds[-1]) for seconds in IDLE_CLIPS_S]
    idle = {f"idle, {seconds:g} s clip": seconds for seconds in lengths}
    loops = {f"{rate:g} requests/s": rate for rate in shape.rates}
    if not journal.lacks([*idle, *loops]):
        return
    with server(journal, shape, device, folder) as url:
        if url is None:
            return
        for number, (name, seconds) in enumerate(idle.items()):
            journal.cell(name, lambda s=seconds, n=number: measure_idle(url, shape, s, n))
        for number, (name, rate) in enumerate(loops.items(), start=len(idle)):
            journal.cell(name, lambda r=rate, n=number: measure_loop(url, shape, r, n))


@contextmanager
def server(journal: Journal, shape: Shape, device: torch.device, folder: Path) -> Iterator[str | None]:
    """A server that is ready, or None where it did not start."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "server", "--model", folder, "--load-format", "dummy", "--device", device.type),
        *("--dtype", "bfloat16", "--generation-config", "none", "--served-model-name", shape.size),
        *("--max-num-seqs", max(shape.batches)),
        *("--max-model-len", 2 * (shape.prompt_tokens + shape.output_tokens) + 256),
        *("--host", "127.0.0.1", "--port", port),
    ]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:

            def wait() -> float:
                started = time.perf_counter()
                if not is_ready(process, url):
                    log.seek(0)
                    raise Unavailable(f"the server did not start:\n{log.read()[-3000:].decode(errors='replace')}")
                return time.perf_counter() - started

            ready = journal.attempt("start", wait, lambda seconds: {"ready_s": seconds})
            yield None if ready is None else url
        finally:
            process.terminate()
            try:
                process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.seek(0)
            sys.stderr.write(log.read()[-4000:].decode(errors="replace"))


def is_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    """Wait until it serves, or has ended, or has had its time."""
    deadline = time.perf_counter() + START_LIMIT_S
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.perf_counter() < deadline and process.poll() is None:
            try:
                if client.get(f"{url}/ready").status_code == 200:
                    return True
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
    return False


def measure_idle(url: str, shape: Shape, seconds: float, number: int) -> dict[str, Any]:
    """One request at a time."""
    words = ["--concurrency", 1, "--requests", shape.idle_requests, "--output-tokens", IDLE_TOKENS]
    return drive(url, [*words, "--clip-seconds", seconds, "--warmup", WARM_UP], number)


def measure_loop(url: str, shape: Shape, rate: float, number: int) -> dict[str, Any]:
    """Requests that come when they come."""
    count = max(2, round(rate * shape.rate_seconds))
    words = ["--rate", rate, "--requests", count, "--output-tokens", shape.output_tokens]
    return drive(url, [*words, "--clip-seconds", shape.prompt_clip_seconds, "--warmup", 1], number)


def drive(url: str, words: list[Any], number: int) -> dict[str, Any]:
    """Raises RuntimeError if a request fails."""
    seed = FIRST_MEASURED_SEED * (1 + number)
    arguments = [str(word) for word in ["--url", url, "--seed", seed, *words]]
    row = load.run(load.parse(arguments))
    if row["num_errors"]:
        raise RuntimeError(f"{row['num_errors']} of {row['requests']} requests failed: {row['errors']}")
    return row
