"""docs/api.md names every parameter of the schema and every one that is refused or ignored."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.api.tokenization import DetokenizeRequest, TokenizeRequest
from server.requests.parameters import (
    IGNORED,
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_IN_MESSAGES,
    REFUSED_IN_RESPONSES,
    REFUSED_IN_TOKENIZE,
    REFUSED_IN_TRANSCRIPTIONS,
)
from server.requests.schema import ChatRequest, CompletionRequest
from server.responses.schema import ResponsesRequest
from server.transcription.form import TranscriptionForm

DOCUMENT = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
NAMES = {
    *ChatRequest.model_fields,
    *CompletionRequest.model_fields,
    *ResponsesRequest.model_fields,
    *REFUSED_IN_CHAT,
    *REFUSED_IN_COMPLETIONS,
    *REFUSED_IN_RESPONSES,
    *REFUSED_IN_MESSAGES,
    *REFUSED_IN_TOKENIZE,
    *TokenizeRequest.model_fields,
    *DetokenizeRequest.model_fields,
    *IGNORED,
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_parameter_is_documented(name: str) -> None:
    assert f"`{name}`" in DOCUMENT


def test_no_parameter_is_both_honoured_and_refused() -> None:
    assert not set(ChatRequest.model_fields) & {*REFUSED_IN_CHAT, *IGNORED}
    assert not set(CompletionRequest.model_fields) & {*REFUSED_IN_COMPLETIONS, *IGNORED}
    assert not set(ResponsesRequest.model_fields) & {*REFUSED_IN_RESPONSES, *IGNORED} - {"metadata"}


def test_lists_of_refused_and_ignored_hold_nothing_else() -> None:
    refused = DOCUMENT.split("Refused unless")[1].split("Accepted without")[0]
    listed = set(re.findall(r"`(\w+)`", refused))
    assert listed == {*REFUSED_IN_CHAT, *REFUSED_IN_MESSAGES}


def test_every_field_of_transcription_is_documented() -> None:
    section = DOCUMENT.split("## POST /v1/audio/transcriptions")[1].split("\n## ")[0]
    fields = {*TranscriptionForm.model_fields, *REFUSED_IN_TRANSCRIPTIONS}
    named = set(re.findall(r"`([\w\[\]]+)`", section))
    assert {name for name in fields if not named & {name, f"{name}[]"}} == set()
