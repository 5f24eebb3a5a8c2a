"""Who makes something of the requests' records: metrics and the log always, traces where they are wanted."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Protocol

from server.observe.request_record import RequestObserver


class TracingError(Exception):
    """Traces are wanted and cannot be made; the message tells the operator what to mend."""


class ClosingObserver(RequestObserver, Protocol):
    """An observer that has to be closed."""

    def close(self) -> None:
        """Blocking: write out what is left."""


def check_tracing() -> None:
    """Raise TracingError where traces cannot be made."""
    for package in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"):
        try:
            is_there = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            is_there = False
        if not is_there:
            raise TracingError("--otlp-traces-endpoint needs OpenTelemetry's SDK: pip install 'tympan[otel]'")


def start_tracer(endpoint: str) -> ClosingObserver:
    """Sends a trace of each request to `endpoint`. Raises TracingError."""
    check_tracing()
    tracer: ClosingObserver = importlib.import_module("server.observe.tracing").RequestTracer.to(endpoint)
    return tracer
