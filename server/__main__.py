"""`python -m server`: settings in, a serving process out. The composition root.

Exit status: 0 after a drained shutdown, 1 when the engine cannot start or is given up, 2 for wrong settings, 128 and
the signal's number when stopped while loading. Failures that the operator can mend are one sentence, no traceback.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from configs.command_line import SettingsError, load_settings
from configs.settings import Settings
from engine.client import EngineClient, ProcessEngineClient
from engine.errors import EngineStartError
from engine.messages import EngineArgs
from engine.supervisor import RestartPolicy, SupervisedEngineClient
from model.checkpoint import resolve_checkpoint
from model.errors import CheckpointError, ModelError
from server.access.key_file import KeysError
from server.app import api_keys, create_app
from server.heap import give_large_blocks_back
from server.http.connection import server_config
from server.http.cross_site import is_loopback
from server.lifecycle import LAST_WORDS_SECONDS, DrainPolicy, serve_until_end
from server.listener import ListenError, listen
from server.observe.logs import configure_logging
from server.observe.metrics_server import metrics_served
from server.observe.observers import TracingError, check_tracing
from server.prompt.consistency import check_folder
from server.start_progress import StartProgress
from server.summary import startup_summary

BUNDLED_CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "tympan-tiny"

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SIGNAL = 128
"""Plus the signal's number, as shells have it."""


logger = logging.getLogger(__name__)


def main() -> int:
    """Run the server that the command line asks for. -> exit status."""
    try:
        settings = load_settings(sys.argv[1:])
    except SettingsError as error:
        return _fail(str(error), EXIT_USAGE)
    return run(settings)


def run(settings: Settings) -> int:
    """Run the server until it ends. -> exit status."""
    try:
        if settings.otlp_traces_endpoint:
            check_tracing()
        is_closed = len(api_keys(settings)) > 0  # what is wrong with keys is told before minutes go into loading
    except (KeysError, TracingError) as error:
        return _fail(str(error), EXIT_USAGE)
    configure_logging(settings.log_level, as_json=settings.log_json)
    give_large_blocks_back()
    if not is_closed and not is_loopback(settings.host):
        logger.warning("open to all who reach %s: set --api-key or --api-key-file", settings.host)
    signal.signal(signal.SIGTERM, _stop_loading)  # until the server has its own handlers
    try:
        return asyncio.run(_run(settings))
    except (EngineStartError, ModelError) as error:
        return _fail(f"the server cannot start: {error}", EXIT_FAILED)
    except ListenError as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_SIGNAL + signal.SIGINT


async def _run(settings: Settings) -> int:
    listener = listen(settings.host, settings.port)  # before minutes go into loading
    for_metrics = None
    if settings.metrics_port is not None:
        for_metrics = listen(settings.metrics_host, settings.metrics_port, "--metrics-port")
    checkpoint = find_checkpoint(settings)
    with StartProgress(as_json=settings.log_json) as progress:
        engine = await SupervisedEngineClient.launch(
            partial(ProcessEngineClient.start, engine_args(settings, checkpoint), progress),
            RestartPolicy(settings.engine_restarts, settings.engine_hang_timeout),
        )
    try:
        return await _serve(settings, engine, checkpoint, listener, for_metrics)
    finally:
        await engine.close()


async def start_engine(settings: Settings) -> tuple[ProcessEngineClient, Path]:
    """Find the checkpoint, and run it in a process. -> the engine, the checkpoint's folder.

    Raises ModelError and EngineStartError.
    """
    checkpoint = find_checkpoint(settings)
    with StartProgress() as progress:
        return await ProcessEngineClient.start(engine_args(settings, checkpoint), progress), checkpoint


def chosen_model(settings: Settings) -> str:
    """What --model says, else the bundled checkpoint. Raises CheckpointError where that did not come along."""
    if settings.model is not None:
        return settings.model
    if not BUNDLED_CHECKPOINT.is_dir():
        raise CheckpointError(
            "the bundled checkpoint comes with a clone of the repository, not with the package: give a --model"
        )
    return str(BUNDLED_CHECKPOINT)


def find_checkpoint(settings: Settings) -> Path:
    """Its folder, downloaded if need be, whose tokenizer is its own. Raises ModelError."""
    folder = resolve_checkpoint(
        chosen_model(settings),
        settings.revision,
        settings.download_dir,
        with_weights=settings.load_format == "auto",
    )
    check_folder(folder)  # before minutes go into loading
    return folder


async def _serve(
    settings: Settings,
    engine: EngineClient,
    checkpoint: Path,
    listener: socket.socket,
    for_metrics: socket.socket | None,
) -> int:
    app = create_app(settings, engine, checkpoint)
    gc.collect()
    gc.freeze()  # what lives as long as the server: each full collection would walk it again, for 70 ms
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    listener.listen()  # who reads the address may use it at once
    name, has_keys = app.state.serving.model_names[0], len(api_keys(settings)) > 0
    print(startup_summary(engine.info, name, address, has_keys=has_keys), flush=True)  # noqa: T201
    config = server_config(app, timeout_graceful_shutdown=LAST_WORDS_SECONDS)
    policy = DrainPolicy(settings.drain_grace, settings.shutdown_timeout)
    async with metrics_served(app.state.metrics, for_metrics, server_config):
        cause = await serve_until_end(app, engine, config, listener, policy)
    return _fail(f"the engine has died: {cause}", EXIT_FAILED) if cause else 0


def engine_args(settings: Settings, checkpoint: Path) -> EngineArgs:
    """What the settings say of the engine that runs `checkpoint`."""
    return EngineArgs(
        model_folder=str(checkpoint),
        load_format=settings.load_format,
        device=settings.device,
        dtype=settings.dtype,
        attention_backend=settings.attention_backend,
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        tensor_parallel_size=settings.tensor_parallel_size,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        encoder_cache_bytes=int(settings.encoder_cache_mb * 2**20),
        enable_prefix_caching=settings.enable_prefix_caching,
        prefix_cache_bytes=None if settings.prefix_cache_mb is None else int(settings.prefix_cache_mb * 2**20),
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        async_scheduling=settings.async_scheduling,
        enforce_eager=settings.enforce_eager,
        kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        num_speculative_tokens=settings.num_speculative_tokens,
        prompt_lookup_min=settings.prompt_lookup_min,
        prompt_lookup_max=settings.prompt_lookup_max,
        seed=settings.seed,
        log_json=settings.log_json,
    )


def _stop_loading(sig: int, _: FrameType | None) -> NoReturn:
    """Unwinds through what is being done, which ends the engine process too."""
    sys.exit(EXIT_SIGNAL + sig)


def _fail(message: str, status: int) -> int:
    print(f"tympan: {message}", file=sys.stderr)  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main())
