"""Servers that are measured: how each is started, when it is ready, what it takes. Linux.

One at a time, in a session of its own, in the same environment; whoever starts one ends it. Resident memory is the
sum over the process and all its children, as PSS (pages that several processes share are counted once) and as RSS
(each process counts them). It knows nothing about requests.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT_S = 300.0
END_LIMIT_S = 30.0
CHILDREN_END_LIMIT_S = 2.0
POLL_S = 0.02
SAMPLE_S = 0.25

MAX_MODEL_LEN = 4096
MAX_NUM_SEQS = 16
MAX_CLIPS = 4
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Taken out of a server's environment: each sets its threads itself."""


@dataclass(frozen=True)
class Recipe:
    """How to start one server. `command` lacks the port, which comes last."""

    name: str
    command: tuple[str, ...]
    ready_path: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def shown(self, checkpoint: Path) -> str:
        """The command without this machine's folders."""
        program = Path(self.command[0]).name
        words = ["CHECKPOINT" if word == str(checkpoint) else word for word in self.command[1:]]
        return " ".join([*(f"{key}={value}" for key, value in self.environment.items()), program, *words])


def tympan(
    checkpoint: Path, dtype: str, kv_gib: int, threads: int | None = None, extra: Sequence[str] = ()
) -> Recipe:
    """Ours, with as much room as the peer; it chooses its threads itself unless told."""
    command = (
        *(sys.executable, "-m", "server", "--model", str(checkpoint), "--dtype", dtype),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)),
        *("--limit-mm-per-prompt", f"audio={MAX_CLIPS}", "--generation-config", "none"),
        *("--kv-cache-memory-bytes", str(kv_gib << 30), *extra, "--host", "127.0.0.1", "--port"),
    )
    return Recipe("tympan", command, "/ready", {"OMP_NUM_THREADS": str(threads)} if threads else {})


def vllm(venv: Path, checkpoint: Path, dtype: str, kv_gib: int, threads: int | None = None) -> Recipe:
    """vLLM's CPU build, with every core bound unless told: by default it leaves one to its HTTP process."""
    command = (
        *(str(venv / "bin" / "vllm"), "serve", str(checkpoint), "--dtype", dtype),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)),
        *("--limit-mm-per-prompt", f'{{"audio": {MAX_CLIPS}}}', "--generation-config", "vllm"),
        *("--host", "127.0.0.1", "--port"),
    )
    cores = f"0-{(threads or os.cpu_count() or 1) - 1}"
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(kv_gib), "VLLM_CPU_OMP_THREADS_BIND": cores}
    return Recipe("vllm", command, "/health", {**environment, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"})


@dataclass
class Memory:
    """Bytes; `pss` is None where the system does not tell it for every process."""

    pss: int | None
    rss: int


class RunningServer:
    """A server that is ready. `ready_s`: seconds from its start till then."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, ready_s: float) -> None:
        self.url, self.ready_s, self.pid = url, ready_s, process.pid
        self._root = psutil.Process(process.pid)

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(one.user + one.system for one in times)

    def memory(self) -> Memory:
        """Resident now. Reading PSS takes tens of milliseconds of a core: not while something is timed."""
        pss: int | None = 0
        rss = 0
        for process in self._processes():
            rss += process.memory_info().rss
            try:
                pss = None if pss is None else pss + process.memory_full_info().pss
            except (psutil.AccessDenied, AttributeError):
                pss = None
        return Memory(pss, rss)

    @contextmanager
    def peak_memory(self) -> Iterator[Memory]:
        """The largest of samples taken while the block runs; valid after it."""
        peak, ended = self.memory(), threading.Event()

        def sample() -> None:
            while not ended.wait(SAMPLE_S):
                now = self.memory()
                peak.rss = max(peak.rss, now.rss)
                peak.pss = None if peak.pss is None or now.pss is None else max(peak.pss, now.pss)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield peak
        finally:
            ended.set()
            thread.join()

    def _processes(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]


@contextmanager
def running(recipe: Recipe, start_limit_s: float = START_LIMIT_S) -> Iterator[RunningServer]:
    """Start it, wait till it is ready, end it with all its children.

    Raises RuntimeError with its last words if it ends or does not get ready.
    """
    environment = {key: value for key, value in os.environ.items() if key not in THREAD_VARIABLES}
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [*recipe.command, str(port)],
            env={**environment, **recipe.environment},
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if not _wait(process, url + recipe.ready_path, started + start_limit_s):
                log.seek(0)
                raise RuntimeError(f"{recipe.name} did not start:\n{log.read()[-2000:].decode(errors='replace')}")
            yield RunningServer(process, url, time.perf_counter() - started)
        finally:
            end_tree(process)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end its children and itself, then kill what is left of them."""
    try:
        root = psutil.Process(process.pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    process.terminate()
    psutil.wait_procs(tree[:1], END_LIMIT_S)
    _, alive = psutil.wait_procs(tree, CHILDREN_END_LIMIT_S)
    for one in alive:
        one.kill()
    process.wait()


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], url: str, deadline: float) -> bool:
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.perf_counter() < deadline and process.poll() is None:
            try:
                if client.get(url).status_code == 200:
                    return True
            except httpx.HTTPError:
                pass
            time.sleep(POLL_S)
    return False
