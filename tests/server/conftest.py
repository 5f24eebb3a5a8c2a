"""A checkpoint folder without weights, a server on a real socket round the fake engine, and clips."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from openai import OpenAI
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Encoder

from configs.settings import Settings
from engine.messages import EngineInfo
from server.app import create_app
from server.http.connection import server_config
from server.lifecycle import DrainingServer, DrainPolicy
from server.observe.metrics import Metrics
from server.prompt.chat_template import DEFAULT_TEMPLATE
from server.prompt.tokenizer import Tokenizer

from .fake_engine import INFO, FakeEngineClient, Script

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CORPUS = [
    "You are a helpful assistant.",
    "What does the person say?",
    "héllo wörld 你好 🎉🎉",
    "user system Audio 1: ",
]


def _make_encoder() -> Encoder:
    encoder = Encoder(models.BPE())
    encoder.normalizer = normalizers.NFC()
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    encoder.train_from_iterator(CORPUS * 50, trainer)
    encoder.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return encoder


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """The reference: the whole tokenizer, special tokens included."""
    return _make_encoder()


@pytest.fixture(scope="session")
def checkpoint(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-audio"
    folder.mkdir()
    encoder.save(str(folder / "tokenizer.json"))
    config = {"model_type": "qwen2_audio", "audio_token_index": encoder.token_to_id("<|AUDIO|>")}
    (folder / "config.json").write_text(json.dumps(config))
    generation = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.5,
        "repetition_penalty": 1.1,
        "eos_token_id": [encoder.token_to_id("<|im_end|>"), encoder.token_to_id("<|endoftext|>")],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": DEFAULT_TEMPLATE}))
    return folder


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(checkpoint)


@dataclass
class Served:
    """A running server, its fake engine and its clients."""

    url: str
    engine: FakeEngineClient
    tokenizer: Tokenizer
    server: DrainingServer
    client: httpx.Client
    """One for all: making one costs more than most requests."""
    metrics: Metrics

    @property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="key", max_retries=0, timeout=10)

    def post(self, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return self.client.post(self.url + path, content=content, headers=headers, **options)

    def say(self, text: str, *, end: bool = True, **script: Any) -> None:
        """Let the engine answer with `text`."""
        ids = self.tokenizer.encode(text) + ([self.tokenizer.special["<|im_end|>"]] if end else [])
        self.engine.script = Script(ids, **script)


class Servers:
    """Starts servers in threads and stops them."""

    def __init__(self, checkpoint: Path, tokenizer: Tokenizer) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._client = httpx.Client(trust_env=False, timeout=10)
        self._running: list[tuple[DrainingServer, threading.Thread]] = []

    def start(
        self, *, info: EngineInfo = INFO, drain_grace_s: float = 0, drain_timeout_s: float = 5, **settings: Any
    ) -> Served:
        started = threading.Event()
        box: list[Served] = []

        async def run() -> None:
            max_model_len = settings.get("max_model_len", info.max_model_len)
            engine = FakeEngineClient(info=replace(info, max_model_len=max_model_len))
            app = create_app(Settings(**settings), engine, self._checkpoint)
            config = server_config(app, port=0, lifespan="on", timeout_graceful_shutdown=1)
            server = DrainingServer(config, app.state.traffic, engine, DrainPolicy(drain_grace_s, drain_timeout_s))
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.005)
            port = server.servers[0].sockets[0].getsockname()[1]
            box.append(
                Served(f"http://127.0.0.1:{port}", engine, self._tokenizer, server, self._client, app.state.metrics)
            )
            started.set()
            await serving

        thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        thread.start()
        assert started.wait(20)
        self._running.append((box[0].server, thread))
        return box[0]

    def stop(self) -> None:
        for server, _ in self._running:
            server.should_exit = True
        for _, thread in self._running:
            thread.join(10)
        self._client.close()


@pytest.fixture(scope="module")
def servers(checkpoint: Path, tokenizer: Tokenizer) -> Iterator[Servers]:
    running = Servers(checkpoint, tokenizer)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def shared_server(servers: Servers) -> Served:
    return servers.start(sse_keep_alive_interval=0.2, max_body_mb=1)


@pytest.fixture
def served(shared_server: Served) -> Served:
    """The module's server, with a clean engine."""
    shared_server.engine.requests.clear()
    shared_server.engine.aborted.clear()
    shared_server.engine.ended.clear()
    shared_server.say("Hello there!")
    return shared_server


def wav_base64(seconds: float = 0.5, *, rate: int = 16_000, samples: int | None = None) -> str:
    count = int(seconds * rate) if samples is None else samples
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.sin(np.arange(count) / 10), rate, format="WAV")
    return base64.b64encode(file.getvalue()).decode()


def audio_part(seconds: float = 0.5, **options: Any) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": wav_base64(seconds, **options), "format": "wav"}}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}
