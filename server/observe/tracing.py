"""Traces over OTLP: a span for each request and one for each of its stages, made from its record when it is over.

The caller's W3C `traceparent` is continued, and its decision whether to sample is kept. Attributes are
OpenTelemetry's for generative AI where it has some, and hold no text. Imports the SDK, an extra of the package: only
server/observe/observers.py imports this, when traces are wanted. The SDK's own OTEL_ variables count.
"""

from __future__ import annotations

import os
import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from server.observe.access_log import PROBES
from server.observe.request_record import RequestRecord
from server.version import VERSION

NAME = "tympan"
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/audio/transcriptions": "transcription",
    "/v1/audio/translations": "translation",
}
"""gen_ai.operation.name by route; there is no convention for the last two."""
MAX_STAGE_SPANS = 256
"""Of one request: a recording of hours has thousands."""


class RequestTracer:
    """A RequestObserver."""

    def __init__(self, processor: SpanProcessor) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME", NAME)
        resource = Resource.create({"service.name": name, "service.version": VERSION})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(NAME, VERSION)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> RequestTracer:
        """One that sends to this URL, from a thread of its own."""
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint)))

    def close(self) -> None:
        """Blocking: send what has not been sent yet."""
        self._provider.shutdown()

    def begin(self, record: RequestRecord) -> None:
        """See RequestObserver."""

    def end(self, record: RequestRecord) -> None:
        """See RequestObserver."""
        if record.route in PROBES:
            return
        epoch = time.time() - time.monotonic()

        def nanoseconds(moment: float) -> int:
            return int((epoch + moment) * 1e9)

        parts = {"traceparent": record.traceparent, "tracestate": record.tracestate}
        parent = self._propagator.extract({name: value for name, value in parts.items() if value})
        operation = OPERATIONS.get(record.route)
        span = self._tracer.start_span(
            f"{operation} {record.model}" if operation and record.model else f"{record.method} {record.route}",
            parent,
            SpanKind.SERVER,
            _attributes(record, operation),
            start_time=nanoseconds(record.began),
        )
        if span.is_recording():
            self._describe(span, record)
            inside = set_span_in_context(span)
            for stage in sorted(record.all_stages, key=lambda stage: stage.began)[:MAX_STAGE_SPANS]:
                child = self._tracer.start_span(stage.name, inside, start_time=nanoseconds(stage.began))
                child.end(nanoseconds(stage.ended))
            if (first_token_s := record.first_token_s) is not None:
                span.add_event("first token", timestamp=nanoseconds(record.began + first_token_s))
        span.end(nanoseconds(record.ended))

    @staticmethod
    def _describe(span: Span, record: RequestRecord) -> None:
        if record.refusal is not None:
            span.set_attribute("error.type", record.refusal)
        if record.status >= 500 or record.is_broken:
            span.set_status(StatusCode.ERROR)


def _attributes(record: RequestRecord, operation: str | None) -> dict[str, AttributeValue]:
    known: dict[str, AttributeValue | None] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "tympan.request_id": record.request_id,
        "tympan.key_id": record.key_id,
        "tympan.client_gone": record.is_client_gone,
    }
    if record.clip_seconds:
        known["tympan.audio.seconds"] = sum(record.clip_seconds)
        known["tympan.audio.count"] = len(record.clip_seconds)
    if generations := record.generations:
        first = generations[0]
        known |= {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": NAME,
            "gen_ai.request.model": record.model,
            "gen_ai.response.model": record.model,
            "gen_ai.request.max_tokens": first.sampling.max_tokens,
            "gen_ai.request.temperature": first.sampling.temperature,
            "gen_ai.request.top_p": first.sampling.top_p,
            "gen_ai.request.choice.count": first.num_choices,
            "gen_ai.usage.input_tokens": sum(one.num_prompt_tokens for one in generations),
            "gen_ai.usage.cache_read.input_tokens": sum(one.num_cached_tokens for one in generations),
            "gen_ai.usage.output_tokens": sum(one.num_tokens for one in generations),
            "tympan.detokenize.seconds": sum(one.detokenize_s for one in generations),
            "gen_ai.response.finish_reasons": [str(reason) for one in generations for reason in one.finish_reasons][
                :MAX_STAGE_SPANS
            ],
        }
    return {name: value for name, value in known.items() if value is not None}
