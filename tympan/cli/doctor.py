"""`tympan doctor`: would `tympan serve` with these flags start, and would it understand what it hears?

Every check is what the server itself does when it starts, so that a failure has the server's own words; the engine
is really started, and the bundled checkpoint really hears a clip. Nothing is downloaded. Exit status: 0 when nothing
failed, warnings or not, 1 when something did, 2 for wrong settings.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import platform
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import httpx
from rich.console import Console

from configs.settings import Settings
from engine import channel
from engine.errors import EngineStartError
from engine.messages import DeviceReport, EngineInfo
from engine.spawn import end, spawn
from model.checkpoint import resolve_checkpoint
from model.config import Qwen2AudioConfig
from model.errors import ModelError
from model.weight_files import check_headers, tensor_files
from server.__main__ import BUNDLED_CHECKPOINT, chosen_model, start_engine
from server.access.key_file import KeysError
from server.app import api_keys, create_app
from server.http.cross_site import is_loopback
from server.listener import ListenError, listen
from server.observe.observers import TracingError, check_tracing
from server.prompt.consistency import check_folder
from server.summary import num_concurrent_requests
from server.version import VERSION
from tympan.cli.errors import EXIT_FAILED
from tympan.session import BASE_URL

SELF_TEST_CLIP = Path(__file__).with_name("self_test.flac")
SELF_TEST_QUESTION = "What does the person say?"
SELF_TEST_WORDS = "four two seven"
OF_THE_MACHINE = ("device", "dtype", "attention_backend", "enforce_eager")
"""Settings that the self-test has in common with the set-up, whatever its checkpoint is."""
GIB = 1 << 30


class State(StrEnum):
    """What came of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    state: State
    text: str


def run(settings: Settings, *, as_json: bool) -> int:
    """Examine and report. -> exit status."""
    checks = asyncio.run(_report(settings, as_json=as_json))
    is_well = all(check.state is not State.FAILED for check in checks)
    if as_json:
        document = {"ok": is_well, "checks": [asdict(check) for check in checks]}
        Console(soft_wrap=True, highlight=False, markup=False).print(json.dumps(document, indent=1))
    return 0 if is_well else EXIT_FAILED


async def _report(settings: Settings, *, as_json: bool) -> list[Check]:
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, quiet=as_json)
    styles = {State.OK: "green", State.WARNING: "yellow", State.FAILED: "bold red", State.SKIPPED: "dim"}
    checks = []
    async for check in examine(settings):
        checks.append(check)
        console.print(f"{check.state:<8}", style=styles[check.state], end="")
        console.print(f"{check.name:<12}{check.text}")
    return checks


async def examine(settings: Settings) -> AsyncIterator[Check]:
    """The checks, in an order in which each needs only what stands before it."""
    report = await asyncio.to_thread(_probe)
    yield _software(report)
    if report is not None:
        yield _devices(report)
    yield _memory()
    yield _access(settings)
    yield _ports(settings)
    folder, check = await asyncio.to_thread(_checkpoint, settings)
    yield check
    if report is None or folder is None:
        yield Check("engine", State.SKIPPED, "it needs what failed above")
        return
    own = settings.model_copy(update={"model": str(folder), "api_key": (), "api_key_file": None})
    async for check in _engine(own):
        yield check


async def _engine(settings: Settings) -> AsyncIterator[Check]:
    """Start the set-up's engine, and let the bundled checkpoint hear something, in the same engine if it is its."""
    is_bundled = Path(settings.model or "") == BUNDLED_CHECKPOINT and settings.load_format == "auto"
    try:
        async with _running(settings) as (info, client):
            for check in _facts(settings, info):
                yield check
            if is_bundled:
                yield await _self_test(client, info)
                return
        if not BUNDLED_CHECKPOINT.is_dir():
            yield Check("self-test", State.SKIPPED, f"the bundled checkpoint is not at {BUNDLED_CHECKPOINT}")
            return
        chosen = {
            name: getattr(settings, name) for name in ("device", "dtype", "attention_backend", "enforce_eager")
        }
        async with _running(Settings(**chosen, model=str(BUNDLED_CHECKPOINT))) as (info, client):
            yield await _self_test(client, info)
    except (EngineStartError, ModelError) as error:
        yield Check("engine", State.FAILED, str(error))


@asynccontextmanager
async def _running(settings: Settings) -> AsyncIterator[tuple[EngineInfo, httpx.AsyncClient]]:
    """An engine, and the server's application in memory. Raises EngineStartError and ModelError."""
    engine, folder = await start_engine(settings)
    try:
        app = create_app(settings, engine, folder)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE_URL, timeout=None) as client,
        ):
            yield engine.info, client
    finally:
        await engine.close()


def _probe() -> DeviceReport | None:
    process, connection = spawn("engine.probe", "tympan-probe", "auto")
    try:
        report: DeviceReport = channel.receive(connection)
        return report
    except (EOFError, OSError):
        return None
    finally:
        end(process)


def _software(report: DeviceReport | None) -> Check:
    if report is None:
        return Check("software", State.FAILED, "torch cannot be imported: `python -c 'import torch'` shows why")
    cuda = f"CUDA {report.cuda}" if report.cuda else "no CUDA"
    text = f"Tympan {VERSION}, Python {platform.python_version()}, torch {report.torch} built for {cuda}"
    return Check("software", State.OK, text)


def _devices(report: DeviceReport) -> Check:
    gpus = [f"{gpu.name}, {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free" for gpu in report.gpus]
    return Check("devices", State.OK, "; ".join([f"CPU {report.cpu}", *(gpus or ["no CUDA device"])]))


def _memory() -> Check:
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Check("memory", State.OK, f"{free_memory() / GIB:.1f} of {pages * page / GIB:.1f} GiB free")


def free_memory() -> int:
    """Bytes that programs may still take; where the system does not tell, those that nobody uses."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _access(settings: Settings) -> Check:
    try:
        num_keys = len(api_keys(settings))
        if settings.otlp_traces_endpoint:
            check_tracing()
    except (KeysError, TracingError) as error:
        return Check("access", State.FAILED, str(error))
    if num_keys:
        return Check("access", State.OK, f"{num_keys} API key(s)")
    if is_loopback(settings.host):
        return Check("access", State.OK, "no API key, and open to this machine only")
    return Check("access", State.WARNING, f"open to all who reach {settings.host}: set --api-key or --api-key-file")


def _ports(settings: Settings) -> Check:
    try:
        listen(settings.host, settings.port).close()
        if settings.metrics_port is not None:
            listen(settings.metrics_host, settings.metrics_port, "--metrics-port").close()
    except ListenError as error:
        return Check("port", State.FAILED, str(error))
    return Check("port", State.OK, f"{settings.host}:{settings.port} is free")


def _checkpoint(settings: Settings) -> tuple[Path | None, Check]:
    """-> its folder unless something is wrong with it, and what there is to say."""
    has_weights = settings.load_format == "auto"
    try:
        folder = resolve_checkpoint(
            chosen_model(settings),
            settings.revision,
            settings.download_dir,
            with_weights=has_weights,
            download=False,
        )
        if has_weights:
            check_headers(folder, tensor_files(folder))
        check_folder(folder)
        config = Qwen2AudioConfig.from_folder(folder)
    except ModelError as error:
        return None, Check("checkpoint", State.FAILED, str(error))
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    text = f"{folder}: {num_bytes / 1e9:.3g} GB of weights, stored in {config.dtype}"
    if num_bytes > free_memory():
        return folder, Check("checkpoint", State.WARNING, f"{text}, more than the machine's free memory")
    return folder, Check("checkpoint", State.OK, text)


def _facts(settings: Settings, info: EngineInfo) -> list[Check]:
    asked = "" if settings.max_model_len is None else " (--max-model-len)"
    context = (
        f"{info.max_model_len} tokens at most{asked}; the KV cache holds {info.num_blocks * info.block_size}, "
        f"{num_concurrent_requests(info)} requests at once with a 30 s clip each"
    )
    return [
        Check("engine", State.OK, f"{info.device} in {info.dtype} ({info.dtype_reason}), {info.load_seconds:.1f} s"),
        Check("attention", State.OK, f"{info.attention_backend}: {info.attention_reason}"),
        Check("context", State.OK, context),
    ]


async def _self_test(client: httpx.AsyncClient, info: EngineInfo) -> Check:
    clip = {"data": base64.b64encode(SELF_TEST_CLIP.read_bytes()).decode(), "format": "flac"}
    content = [{"type": "input_audio", "input_audio": clip}, {"type": "text", "text": SELF_TEST_QUESTION}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 32}
    response = await client.post("/chat/completions", json=body)
    if response.status_code != httpx.codes.OK:
        return Check("self-test", State.FAILED, f"HTTP {response.status_code}: {response.text[:200]}")
    heard = str(response.json()["choices"][0]["message"]["content"])
    if heard.split() == SELF_TEST_WORDS.split():
        return Check("self-test", State.OK, f'the bundled checkpoint heard "{heard}"')
    advice = "try --attention-backend reference and --dtype float32, and report it"
    text = f'the bundled checkpoint heard "{heard}" instead of "{SELF_TEST_WORDS}" on {info.device}: {advice}'
    return Check("self-test", State.FAILED, text)
