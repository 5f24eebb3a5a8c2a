"""The OpenAPI document: complete, valid, and true: schemathesis sends what it allows, and what it does not."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from server.api.answers import (
    ChatAnswer,
    CompletionAnswer,
    TokenizeAnswer,
    TranscriptionAnswer,
    TranslationAnswer,
    VerboseTranscript,
)
from server.api.openapi import EVENTS, make_document, operations
from server.api.routes import router

from .conftest import Served, Servers, audio_part, text_part, user, wav_base64

CONFIG: dict[str, Any] = {
    "seed": 20_000,
    "generation": {"max-examples": 15, "deterministic": True, "database": "none"},
    "phases": {"stateful": {"enabled": False}},
}


DOCUMENT = make_document(router.routes, has_keys=False)
schema = schemathesis.openapi.from_dict(DOCUMENT, config=SchemathesisConfig.from_dict(CONFIG))


@pytest.fixture
def answering(shared_server: Served) -> Served:
    """A server that has something to say: one for all the requests of a test."""
    shared_server.say("Hello there!")
    return shared_server


@schema.parametrize()
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_answers_are_as_documented(answering: Served, case: Any) -> None:
    """No 5xx, no undocumented status or content type, bodies of the promised shape, errors in the envelope.

    Which requests are refused is not in a schema's power to say: template, context and vocabulary decide too.
    """
    response = case.call(base_url=answering.url, timeout=20)
    case.validate_response(response, excluded_checks=[positive_data_acceptance, negative_data_rejection])


def test_every_route_is_documented() -> None:
    document = make_document(router.routes, has_keys=True)
    served = {
        (method.lower(), re.sub(r":\w+}", "}", route.path))
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert {(method, path) for path, item in document["paths"].items() for method in item} == served
    assert len(list(operations(router.routes))) == len(router.routes)


def test_every_documented_route_exists(served: Served) -> None:
    assert served.client.get(f"{served.url}/openapi.json").json() == DOCUMENT
    for path, item in DOCUMENT["paths"].items():
        for method in item:
            response = served.client.request(method, served.url + re.sub(r"{\w+}", "x", path))
            assert response.status_code != 405
            assert "Unknown request URL." not in response.text


def test_document_is_whole_and_small(served: Served) -> None:
    text = served.client.get(f"{served.url}/openapi.json").text
    document = json.loads(text)
    pointers = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert pointers <= document["components"]["schemas"].keys()
    assert "UnknownPart" not in text
    ids = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(ids) == len(set(ids))
    assert len(text) < 100_000


def test_keys_are_in_the_document_where_there_are_keys(servers: Servers) -> None:
    server = servers.start(api_key=("secret",))
    headers = {"Authorization": "Bearer secret"}
    assert server.client.get(f"{server.url}/openapi.json").status_code == 401
    document = server.client.get(f"{server.url}/openapi.json", headers=headers).json()
    for path, item in document["paths"].items():
        for operation in item.values():
            is_open = path in ("/health", "/ready")
            assert ("401" in operation["responses"]) == ("security" in operation) == (not is_open)


@pytest.mark.parametrize("logprobs", [True, False])
def test_answers_hold_what_is_promised(served: Served, logprobs: bool) -> None:
    messages = [user(audio_part(), text_part("Well?"))]
    fields = {"logprobs": True, "top_logprobs": 2} if logprobs else {}
    answer = ChatAnswer.model_validate_json(served.post({"messages": messages, **fields}).content, strict=True)
    assert (answer.choices[0].logprobs is not None) == logprobs
    fields = {"logprobs": 2} if logprobs else {}
    body = {"prompt": "Hi", **fields}
    assert CompletionAnswer.model_validate_json(served.post(body, "/v1/completions").content, strict=True).choices
    ids = {"return_token_ids": True}
    chat = ChatAnswer.model_validate_json(served.post({"messages": messages, **ids}).content, strict=True)
    assert chat.prompt_token_ids
    assert chat.choices[0].token_ids
    completion = CompletionAnswer.model_validate_json(
        served.post(body | ids, "/v1/completions").content, strict=True
    )
    assert completion.choices[0].prompt_token_ids
    assert completion.choices[0].token_ids
    assert TokenizeAnswer.model_validate_json(served.post({"messages": messages}, "/tokenize").content, strict=True)


@pytest.mark.parametrize("response_format", ["json", "text", "srt", "vtt", "verbose_json", "stream"])
@pytest.mark.parametrize(("path", "model"), [
    ("/v1/audio/transcriptions", TranscriptionAnswer), ("/v1/audio/translations", TranslationAnswer),
])  # fmt: skip
def test_transcripts_hold_what_is_promised(
    served: Served, path: str, model: type[TranscriptionAnswer | TranslationAnswer], response_format: str
) -> None:
    """schemathesis' files are never audio: these answers it does not see."""
    fields = {"stream": "true"} if response_format == "stream" else {"response_format": response_format}
    files = {"file": ("a.wav", base64.b64decode(wav_base64(1.0)))}
    response = served.client.post(served.url + path, data=fields, files=files)
    promised = DOCUMENT["paths"][path]["post"]["responses"]
    answers = promised[str(response.status_code)]["content"]
    media_type = response.headers["content-type"].split(";")[0]
    assert media_type in answers
    if path.endswith("translations") and response_format == "stream":
        assert response.status_code == 400
        assert EVENTS not in promised["200"]["content"]
    else:
        assert response.status_code == 200
    if response.status_code == 200 and media_type == "application/json":
        answer = model.model_validate_json(response.content, strict=True).root
        assert (type(answer) is VerboseTranscript) == (response_format == "verbose_json")


def test_forms_name_their_fields_as_they_are_sent() -> None:
    """`task` is the route, and lists have their brackets."""
    fields = {}
    for path in ("transcriptions", "translations"):
        body = DOCUMENT["paths"][f"/v1/audio/{path}"]["post"]["requestBody"]["content"]["multipart/form-data"]
        fields[path] = body["schema"]["properties"]
        assert body["schema"]["required"] == ["file"]
        assert {"file", "timestamp_granularities[]", "response_format"} <= fields[path].keys()
        assert "task" not in fields[path]
    assert fields["translations"]["stream"]["const"] is False
    assert "const" not in fields["transcriptions"]["stream"]
