"""Traces: what spans a request leaves behind, whose trace they continue, and that they arrive."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from configs.settings import Settings
from server.app import create_app
from server.observe import observers
from server.observe.observers import TracingError
from server.observe.tracing import RequestTracer
from server.prompt.tokenizer import Tokenizer

from .conftest import audio_part, text_part, user
from .fake_engine import FakeEngineClient, Script

ROOT = Path(__file__).parents[2]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHAT = "/v1/chat/completions"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Where the spans of applications made meanwhile are kept."""
    kept = InMemorySpanExporter()
    monkeypatch.setattr(RequestTracer, "to", lambda endpoint: RequestTracer(SimpleSpanProcessor(kept)))
    return kept


def ask(checkpoint: Path, tokenizer: Tokenizer, body: Any, endpoint: str = "http://x", **headers: str) -> int:
    """One request to an application that traces, and its end. -> the status."""

    async def run() -> int:
        end = tokenizer.special["<|im_end|>"]
        engine = FakeEngineClient(Script([*tokenizer.encode("Secret words"), end], delay_s=0.01))
        app = create_app(Settings(otlp_traces_endpoint=endpoint), engine, checkpoint)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tympan")
        async with app.router.lifespan_context(app), client:
            assert (await client.get("/health")).status_code == 200
            return (await client.post(CHAT, json=body, headers=headers)).status_code

    return asyncio.run(run())


def test_a_span_for_the_request_and_one_for_each_stage(
    checkpoint: Path, tokenizer: Tokenizer, spans: InMemorySpanExporter
) -> None:
    body = {"messages": [user(audio_part(1.5), text_part("secret?"))], "temperature": 0, "max_tokens": 50}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b", "x-request-id": "mine"}
    before = time.time_ns()
    assert ask(checkpoint, tokenizer, body, **headers) == 200
    *stages, request = by_end = spans.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in by_end} == {TRACE}
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.context.trace_state.get("a") == "b"
    assert (request.name, request.kind) == ("chat tiny-audio", SpanKind.SERVER)
    assert {span.name for span in stages} == {"decode", "prompt", "grammar", "queue", "prefill", "generate"}
    assert request.start_time is not None
    assert before - 10**6 <= request.start_time
    for span in stages:
        assert span.parent is not None
        assert span.parent.span_id == request.context.span_id
        assert inside(span, request)
    assert [event.name for event in request.events] == ["first token"]
    attributes = dict(request.attributes or {})
    assert attributes.pop("gen_ai.usage.input_tokens", 0) > 30  # type: ignore[operator]
    assert attributes.pop("gen_ai.usage.output_tokens", 0) > 1  # type: ignore[operator]
    assert 0 < attributes.pop("tympan.detokenize.seconds", 0) < 5  # type: ignore[operator]
    assert attributes == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "tympan.request_id": "mine",
        "tympan.client_gone": False,
        "tympan.audio.seconds": 1.5,
        "tympan.audio.count": 1,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tympan",
        "gen_ai.request.model": "tiny-audio",
        "gen_ai.response.model": "tiny-audio",
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.choice.count": 1,
        "gen_ai.usage.cache_read.input_tokens": 16,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    assert "ecret" not in "".join(span.to_json() for span in by_end)


def inside(span: ReadableSpan, other: ReadableSpan) -> bool:
    assert span.start_time and span.end_time and other.start_time and other.end_time  # noqa: PT018
    slack = 10**6  # each moment is rounded by itself
    return other.start_time - slack <= span.start_time <= span.end_time <= other.end_time + slack


def test_errors_and_traces_of_others(checkpoint: Path, tokenizer: Tokenizer, spans: InMemorySpanExporter) -> None:
    assert ask(checkpoint, tokenizer, {"messages": []}, traceparent="00-garbage") == 400
    [refused] = spans.get_finished_spans()
    assert refused.parent is None
    assert refused.name == f"POST {CHAT}"
    assert refused.attributes is not None
    assert refused.attributes["error.type"]
    assert refused.status.status_code is StatusCode.UNSET
    assert ask(checkpoint, tokenizer, {"messages": [user("Hi")]}, traceparent=f"00-{TRACE}-{PARENT}-00") == 200
    assert len(spans.get_finished_spans()) == 1, "the caller does not sample"


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """A collector on this machine."""
    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    server.shutdown()
    thread.join(10)
    server.server_close()


def test_spans_arrive_over_otlp(
    checkpoint: Path, tokenizer: Tokenizer, receiver: tuple[str, list[ExportTraceServiceRequest]]
) -> None:
    url, received = receiver
    body = {"messages": [user("Hi")]}
    assert ask(checkpoint, tokenizer, body, url, traceparent=f"00-{TRACE}-{PARENT}-01") == 200
    [resource] = [resource for export in received for resource in export.resource_spans]
    facts = {fact.key: fact.value.string_value for fact in resource.resource.attributes}
    assert facts["service.name"] == "tympan"
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert {span.name for span in spans} == {"chat tiny-audio", "prompt", "grammar", "queue", "prefill", "generate"}


def test_without_the_sdk_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TracingError, match=r"pip install 'tympan\[otel\]'"):
        observers.start_tracer("http://localhost")


def test_the_sdk_is_not_loaded_unless_wanted() -> None:
    script = "import server.__main__, sys; assert 'opentelemetry.sdk' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
