"""A request that goes wrong in the engine, over HTTP: it ends alone, and the traces of all arrive at a collector."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.integration.conftest import ServerProcess, input_audio, start_server, text, wav
from tests.reference import BUNDLED, build, noise

POISON = "~"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHAT = "/v1/chat/completions"
TRACED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture(scope="module")
def collected() -> Iterator[tuple[str, list[Span]]]:
    """A collector on this machine: its address, and the spans that have come."""
    spans: list[Span] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            export = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            spans.extend(
                span for resource in export.resource_spans for scope in resource.scope_spans for span in scope.spans
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{collector.server_port}/v1/traces", spans
    collector.shutdown()
    thread.join(10)
    collector.server_close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collected: tuple[str, list[Span]]) -> Iterator[ServerProcess]:
    """A random checkpoint in which one sign is not a number."""
    folder = build(tmp_path_factory.mktemp("poisoned"))
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.embed_tokens.weight"][sign()] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    started = start_server(
        "--model", str(folder), "--served-model-name", "random", "--max-model-len", "1024",
        "--otlp-traces-endpoint", collected[0],
    )  # fmt: skip
    yield started
    assert started.stop() == 0


def sign() -> int:
    """The id of the sign."""
    [only] = Tokenizer.from_file(str(BUNDLED / "tokenizer.json")).encode(POISON).ids
    return only


def ask(server: ServerProcess, said: str, request_id: str, **more: Any) -> httpx.Response:
    """A clip and a sentence; an honest answer never has the sign in it."""
    rate = more.pop("rate", 16_000)
    parts = [input_audio(wav(noise(rate), rate)), text(said)]
    body = {
        "messages": [{"role": "user", "content": parts}], "max_tokens": 24, "temperature": 0, "ignore_eos": True,
        "logit_bias": {str(sign()): -100}, **more,
    }  # fmt: skip
    return server.http.post(CHAT, json=body, headers={**TRACED, "x-request-id": request_id})


def content(answer: httpx.Response) -> str:
    """What an honest answer says."""
    assert answer.status_code == 200, answer.text[:300]
    return str(answer.json()["choices"][0]["message"]["content"])


def test_logits_that_are_not_numbers_end_one_request(server: ServerProcess) -> None:
    """Whole and streamed, among honest ones, again and again in the same blocks; the engine goes on."""
    engine = server.engine_pid()
    alone = content(ask(server, "Well?", "alone"))
    for turn in range(3):
        with ThreadPoolExecutor(6) as threads:
            good = [threads.submit(ask, server, "Well?", f"good-{turn}-{number}") for number in range(4)]
            bad = threads.submit(ask, server, f"Well{POISON}?", f"bad-{turn}")
            stream = threads.submit(ask, server, f"Oh{POISON}?", f"stream-{turn}", stream=True)
        assert [content(one.result()) for one in good] == [alone] * 4
        for failed in (bad.result(), stream.result()):
            assert failed.status_code == 500, "the first output is awaited before a stream's headers"
            error = failed.json()["error"]
            assert "is not a number" in error["message"]
            assert error["type"] == "server_error"
            assert "retry-after" not in failed.headers
    assert server.engine_pid() == engine
    assert content(ask(server, "Well?", "after")) == alone


def test_a_stream_that_is_poisoned_on_its_way_ends_with_an_error(server: ServerProcess) -> None:
    """By its own answer: once the sign is said, the next logits are no numbers."""
    stream = server.openai.chat.completions.create(
        model="random", messages=[{"role": "user", "content": "Well?"}], stream=True, max_tokens=9,
        extra_body={"structured_outputs": {"regex": f"a{POISON}a{{4}}"}}, extra_headers={"x-request-id": "broken"},
    )  # fmt: skip
    said: list[str] = []
    with pytest.raises(openai.APIError, match="is not a number"):
        said.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(said).startswith("a")
    assert content(ask(server, "Well?", "after-a-stream"))
    assert re.search(r'^tympan:refusals_total{reason="500"} 7', server.http.get("/metrics").text, re.MULTILINE)


def test_the_spans_of_all_arrive(server: ServerProcess, collected: tuple[str, list[Span]]) -> None:
    """One tree for each request: under the caller's span, a child for each stage, an error where there was one."""
    ask(server, "And now?", "traced-good", rate=44_100)
    ask(server, f"And{POISON}?", "traced-bad")
    deadline = time.monotonic() + 30
    while len(found := trees(collected[1], "traced-good", "traced-bad", "broken")) < 3:
        assert time.monotonic() < deadline, "the exporter sends every five seconds"
        time.sleep(0.1)
    stages = {"decode", "resample", "prompt", "grammar", "queue", "encode", "prefill", "generate"}
    for request, names in found[:2]:
        assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
        assert request.name == "chat random"
        is_good = request is found[0][0]
        assert names == stages if is_good else {"decode", "prompt"} <= names
        facts = {fact.key: fact.value for fact in request.attributes}
        assert facts["http.response.status_code"].int_value == (200 if is_good else 500)
        assert facts["tympan.audio.seconds"].double_value == 1.0
        assert (facts["gen_ai.usage.output_tokens"].int_value == 24) == is_good
    assert {"error.type": "500"}.items() <= {
        fact.key: fact.value.string_value for fact in found[2][0].attributes
    }.items()
    are_errors = [request.status.code == Status.STATUS_CODE_ERROR for request, _ in found]
    assert are_errors == [False, True, True], "a stream's too, whose status was 200"


def trees(spans: list[Span], *request_ids: str) -> list[tuple[Span, set[str]]]:
    """-> those requests that have arrived, each with the names of its children."""
    known = {
        fact.value.string_value: span for span in spans for fact in span.attributes
        if fact.key == "tympan.request_id"
    }  # fmt: skip
    requests = [known[request_id] for request_id in request_ids if request_id in known]
    return [
        (request, {span.name for span in spans if span.parent_span_id == request.span_id}) for request in requests
    ]
