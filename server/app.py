"""The application put together: settings and an engine in, an ASGI application out.

The one place, with server/__main__.py, that reads the settings; what the other modules need is handed to them.
Starts and stops nothing but the audio loader and the compiler of grammars.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from audio import AudioLimits, AudioLoader, FetchPolicy
from audio.fetch import MediaFetcher
from audio.local_file import LocalFiles
from audio.media_cache import MediaCache
from configs.recipes import transcription_recipe
from configs.settings import Settings
from engine.client import EngineClient
from engine.cores import usable_cores
from engine.supervisor import SupervisedEngineClient
from model.config import SAMPLE_RATE, GenerationConfig, Qwen2AudioConfig
from server.access.admission import PromptQueue, Traffic
from server.access.auth import ApiKeys
from server.access.held_bytes import Budget
from server.access.key_file import KeyFile
from server.access.quota import QuotaLimits, Quotas, QuotaScope
from server.api.openapi import make_document
from server.api.routes import allowed_methods, route_of, router
from server.errors import to_api_error
from server.generation.serving import Serving
from server.http.cors import Cors
from server.http.cross_site import CrossSiteGuard, is_loopback
from server.http.middleware import RequestScope
from server.media.loader import MediaLoader
from server.media.store import AudioStore
from server.observe.access_log import AccessLog
from server.observe.metrics import Metrics
from server.observe.observers import start_tracer
from server.observe.request_record import RequestObserver
from server.playground import Playground
from server.prompt.builder import PromptBuilder
from server.prompt.chat_template import ChatTemplate
from server.prompt.consistency import check_tokenizer
from server.prompt.tokenizer import Tokenizer
from server.structured.compiler import GrammarCompiler
from server.transcription.recipe import Recipe
from server.transcription.transcriber import Transcriber

MIB = 1 << 20

_CHAT_END = "<|im_end|>"
_END_TOKENS = (_CHAT_END, "<|endoftext|>")
"""What ends an answer when generation_config.json does not say."""


def create_app(settings: Settings, engine: EngineClient, checkpoint: Path) -> FastAPI:
    """An application that answers with `engine`, which runs `checkpoint`.

    Raises ConfigError when the checkpoint's tokenizer, template or configuration cannot be used, KeysError for keys
    that cannot, TracingError.
    """
    keys = api_keys(settings)
    loader = _audio_loader(settings, keys)
    quotas = Quotas(_quota_limits(settings))
    serving = _serving(settings, engine, checkpoint, _media(settings, engine, loader, keys, quotas))
    metrics = _metrics(engine, serving.model_names[0])
    tracer = start_tracer(settings.otlp_traces_endpoint) if settings.otlp_traces_endpoint else None
    observers: list[RequestObserver] = [metrics, AccessLog(), *((tracer,) if tracer else ())]

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loader.warm_up()
        yield
        await loader.aclose()
        serving.grammars.close()
        if tracer:
            await asyncio.to_thread(tracer.close)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.serving = serving
    app.state.transcriber = _transcriber(settings, serving, loader)
    app.state.traffic = _traffic(settings, engine)
    app.state.metrics = metrics
    app.state.started = int(time.time())
    app.state.max_body_bytes = int(settings.max_body_mb * MIB)
    app.state.max_upload_bytes = int(settings.max_upload_mb * MIB)
    app.state.openapi = make_document(router.routes, has_keys=len(keys) > 0)
    app.include_router(router)
    playground = Playground(is_on=settings.playground)
    app.router.routes.extend(playground.routes)
    app.add_exception_handler(HTTPException, _refuse)
    _add_layers(app, settings, keys, quotas, observers, playground)
    return app


def _add_layers(
    app: FastAPI,
    settings: Settings,
    keys: ApiKeys,
    quotas: Quotas,
    observers: Sequence[RequestObserver],
    playground: Playground,
) -> None:
    """What stands round the routes, the innermost first."""
    if quotas.has_limits:
        app.add_middleware(QuotaScope, quotas=quotas)
    app.add_middleware(
        CrossSiteGuard,
        has_keys=lambda: len(keys) > 0,
        is_local=is_loopback(settings.host),
        hosts=settings.allowed_hosts,
        origins=settings.allowed_origins,
    )
    app.add_middleware(
        RequestScope,
        keys=keys,
        traffic=app.state.traffic,
        route_of=lambda scope: playground.route_of(scope["path"]) or route_of(scope),
        is_open=playground.is_open,
        observers=observers,
        meter=app.state.metrics,
    )
    if settings.allowed_origins:
        app.add_middleware(Cors, origins=settings.allowed_origins)


def api_keys(settings: Settings) -> ApiKeys:
    """The keys that the settings name. Raises KeysError."""
    return ApiKeys(settings.api_key, KeyFile(Path(settings.api_key_file)) if settings.api_key_file else None)


def _traffic(settings: Settings, engine: EngineClient) -> Traffic:
    return Traffic(
        engine.info.max_num_seqs + settings.max_num_queued_reqs,
        Budget(settings.max_body_memory_mb * MIB),
        Budget(settings.max_body_disk_mb * MIB),
        Budget(settings.max_audio_memory_mb * MIB),
    )


def _serving(settings: Settings, engine: EngineClient, checkpoint: Path, media: MediaLoader) -> Serving:
    tokenizer = Tokenizer.from_folder(checkpoint)
    template = ChatTemplate.from_folder(checkpoint)
    check_tokenizer(tokenizer, template, checkpoint)
    return Serving(
        model_names=settings.served_model_name or (settings.model or checkpoint.name,),
        engine=engine,
        prompts=PromptBuilder(
            tokenizer=tokenizer,
            template=template,
            audio_token_id=Qwen2AudioConfig.from_folder(checkpoint).audio_token_id,
            max_model_len=engine.info.max_model_len,
        ),
        media=media,
        grammars=GrammarCompiler(checkpoint, engine.info.vocab_size),
        defaults=_generation_defaults(settings, checkpoint, tokenizer),
        keep_alive_s=settings.sse_keep_alive_interval or None,
        queue=PromptQueue(settings.max_num_queued_tokens),
        time_limit_s=settings.request_timeout or None,
    )


def _metrics(engine: EngineClient, model_name: str) -> Metrics:
    metrics = Metrics(engine, model_name)
    if isinstance(engine, SupervisedEngineClient):
        engine.on_restart = metrics.engine_restarted
    return metrics


def _generation_defaults(settings: Settings, checkpoint: Path, tokenizer: Tokenizer) -> GenerationConfig:
    """The checkpoint's sampling defaults, or neutral ones; the ends of an answer in any case."""
    own = GenerationConfig.from_folder(checkpoint)
    ends = own.eos_token_ids or tuple(tokenizer.special[end] for end in _END_TOKENS if end in tokenizer.special)
    chosen = own if settings.generation_config == "auto" else GenerationConfig()
    return GenerationConfig(
        eos_token_ids=ends,
        temperature=chosen.temperature,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
        repetition_penalty=chosen.repetition_penalty,
    )


def _transcriber(settings: Settings, serving: Serving, loader: AudioLoader) -> Transcriber:
    is_chat = serving.prompts.tokenizer.special.get(_CHAT_END) in serving.defaults.eos_token_ids
    kind = settings.transcription_recipe
    if kind == "auto":
        kind = "chat" if is_chat else "base"
    of_clips = AudioLimits()
    scale = settings.max_transcription_seconds / of_clips.max_clip_seconds
    limits = AudioLimits(
        max_clip_bytes=int(settings.max_upload_mb * MIB),
        max_clip_seconds=settings.max_transcription_seconds,
        max_decoded_bytes=int(of_clips.max_decoded_bytes * scale),
    )
    window_samples = int(settings.transcription_window_seconds * SAMPLE_RATE)
    return Transcriber(serving, loader, limits, Recipe(**transcription_recipe(kind)), window_samples)


def _audio_loader(settings: Settings, keys: ApiKeys) -> AudioLoader:
    limits = AudioLimits(
        max_clip_bytes=int(settings.max_audio_clip_mb * MIB),
        max_clip_seconds=settings.max_audio_seconds,
    )
    policy = FetchPolicy(
        allowed_domains=frozenset(settings.allowed_media_domains),
        allowed_private_hosts=frozenset(settings.allowed_private_media_hosts),
    )
    cache = MediaCache(int(settings.media_cache_mb * MIB), num_scopes=keys.__len__)
    folder = settings.allowed_local_media_path
    return AudioLoader(
        limits,
        MediaFetcher(policy, limits, cache=cache),
        local_files=None if folder is None else LocalFiles(folder, limits),
        num_cores=usable_cores(),
    )


def _media(
    settings: Settings, engine: EngineClient, loader: AudioLoader, keys: ApiKeys, quotas: Quotas
) -> MediaLoader:
    return MediaLoader(
        loader,
        max_clips=settings.max_audio_clips,
        store=_audio_store(settings, keys),
        long_audio=settings.long_audio,
        max_request_seconds=settings.max_audio_seconds_per_request,
        max_request_tokens=engine.info.max_model_len,
        quotas=quotas,
    )


def _quota_limits(settings: Settings) -> QuotaLimits:
    return QuotaLimits(
        requests_per_minute=settings.max_requests_per_minute,
        audio_seconds_per_minute=settings.max_audio_seconds_per_minute,
        concurrent_requests=settings.max_concurrent_requests_per_key,
    )


def _audio_store(settings: Settings, keys: ApiKeys) -> AudioStore:
    """Every key has an equal share."""
    max_bytes = int(settings.max_stored_audio_mb * MIB)
    return AudioStore(max_bytes, settings.stored_audio_ttl, num_scopes=keys.__len__)


async def _refuse(request: Request, error: Exception) -> Response:
    told = to_api_error(error)
    request.state.record.refusal = str(told.status)
    if told.status == 405 and (methods := allowed_methods(request.scope)):
        told = replace(told, headers={"Allow": ", ".join(methods)})
    return told.response()
