"""The offline class round the fake engine: everything real but the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.prompt.tokenizer import Tokenizer
from tests.server.conftest import checkpoint, encoder, servers, tokenizer
from tests.server.fake_engine import FakeEngineClient, Script
from tympan import LLM

__all__ = ["checkpoint", "encoder", "servers", "tokenizer"]

MakeLLM = Callable[..., tuple[LLM, FakeEngineClient]]


@pytest.fixture
def make_llm(
    checkpoint: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[MakeLLM]:
    """Makes an LLM whose engine answers "Hello there!"; closed after the test."""
    made: list[LLM] = []

    def make(engine: FakeEngineClient | None = None, **settings: Any) -> tuple[LLM, FakeEngineClient]:
        fake = engine or FakeEngineClient()
        if engine is None:
            fake.script = Script([*tokenizer.encode("Hello there!"), tokenizer.special["<|im_end|>"]])

        async def start_engine(_: object) -> tuple[FakeEngineClient, Path]:
            return fake, checkpoint

        monkeypatch.setattr("tympan.session.start_engine", start_engine)
        made.append(LLM(**settings))
        return made[-1], fake

    yield make
    for llm in made:
        llm.close()
