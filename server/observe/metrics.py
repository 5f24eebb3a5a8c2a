"""Prometheus metrics: vLLM's names for what routers, autoscalers and dashboards read, `tympan:` for the rest.

One registry for each application, nothing global. What the engine counts is read when somebody asks
(engine_collector.py); tokens are counted as they come; all else is taken from a request's record at its end.
No label is ever a value that a client chose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from engine.messages import FinishReason
from server.observe import buckets
from server.observe.engine_collector import LABELS, EngineCollector
from server.observe.request_record import GenerationRecord, RequestRecord
from server.tools.plan import TOOL_CALLS

if TYPE_CHECKING:
    from engine.client import EngineClient

ENGINE_INDEX = "0"
"""vLLM numbers its engines; here is one."""
OPENMETRICS = "application/openmetrics-text"
KEEP_NAMES = "allow-utf-8"
"""Escaping under which the client library leaves colons in names; by default OpenMetrics would have `vllm_`."""
TURNED_AWAY = (429, 503)
"""Statuses of requests that were refused for what the server or the caller was busy with."""


class _WithoutCreated(Collector):
    """The metrics without the time at which each was made: a third of all lines, which nobody reads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """All families."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """See the module's docstring; a Meter and a RequestObserver."""

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._lean = _WithoutCreated(self._registry)
        self._labels = (model_name, ENGINE_INDEX)
        self._registry.register(EngineCollector(engine, self._labels))
        ProcessCollector(registry=self._registry)
        self._make_tokens(buckets.token_counts(engine.info.max_model_len))
        self._make_latencies()
        self._make_own()

    def _make_tokens(self, counts: Sequence[float]) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that had an answer.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Those of them that were not computed.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self._per_prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", counts)
        self._per_answer = self._histogram("request_generation_tokens", "Tokens of its answers.", counts)
        self._max_tokens = self._histogram("request_params_max_tokens", "What max_tokens was.", counts)
        self._choices = self._histogram("request_params_n", "What n was.", buckets.CHOICES)
        labels = (*LABELS, "finished_reason")
        self._ended = Counter("vllm:request_success", "Answers by how they ended.", labels, registry=self._registry)
        for reason in FinishReason:
            self._ended.labels(*self._labels, reason)
        labels = (*LABELS, "reason")
        text = "Requests refused while the server, or the caller's share of it, was full."
        self._rejections = Counter("vllm:admission_rejections", text, labels, registry=self._registry)

    def _make_latencies(self) -> None:
        def latency(name: str, text: str) -> Histogram:
            return self._histogram(name, text, buckets.LATENCY)

        text = "From the request, its audio included, to its first token."
        self._first_token = self._histogram("time_to_first_token_seconds", text, buckets.TIME_TO_FIRST_TOKEN)
        text = "Between the tokens of an answer."
        self._token_gap = self._histogram("inter_token_latency_seconds", text, buckets.TOKEN_GAP)
        text = "The mean of an answer's gaps."
        self._mean_gap = self._histogram("request_time_per_output_token_seconds", text, buckets.TOKEN_GAP)
        self._whole = latency("e2e_request_latency_seconds", "From the request to its last token.")
        self._queue = latency("request_queue_time_seconds", "Waiting in the engine.")
        self._prefill = latency("request_prefill_time_seconds", "From there to the first token.")
        self._decode = latency("request_decode_time_seconds", "From the first token to the last.")
        self._inference = latency("request_inference_time_seconds", "Prefill and decode together.")

    def _make_own(self) -> None:
        registry = self._registry
        text = (
            "Stages of requests: fetch, decode (audio), resample as part of it, prompt, grammar; queue, prefill and "
        )
        text += (
            "encode in the engine, encode being its part of prefill; first_token, per_token, generate; detokenize."
        )
        self._stages = Histogram("tympan:stage_seconds", text, ("stage",), buckets=buckets.STAGE, registry=registry)
        self._audio_s = Counter("tympan:audio_seconds", "Audio heard, in seconds.", registry=registry)
        self._clips = Counter("tympan:audio_clips", "Recordings, and windows of long ones.", registry=registry)
        text = "Audio files by what their first bytes said they are."
        self._files = Counter("tympan:audio_files", text, ("format",), registry=registry)
        self._file_bytes = Counter("tympan:audio_bytes", "Bytes of audio files.", registry=registry)
        text = "Requests whose answer was, or ended with, an error: its code, or its status where it has none."
        self._refusals = Counter("tympan:refusals", text, ("reason",), registry=registry)
        text = "Engines started because the one before had failed."
        self._restarts = Counter("tympan:engine_restarts", text, registry=registry)
        text = "Requests whose client left before the answer was whole."
        self._gone = Counter("tympan:clients_gone", text, registry=registry)
        text = "Requests under way."
        self._in_flight = Gauge("tympan:http_requests_in_flight", text, ("route",), registry=registry)
        text = "Answers by route and status."
        self._responses = Counter("tympan:http_responses", text, ("route", "status"), registry=registry)
        text = "From a request's head to its answer's last byte."
        self._seconds = Histogram(
            "tympan:http_request_seconds", text, ("route",), buckets=buckets.LATENCY, registry=registry
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, LABELS, registry=self._registry).labels(*self._labels)

    def _histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        whole = Histogram(f"vllm:{name}", text, LABELS, registry=self._registry, buckets=bounds)
        return whole.labels(*self._labels)

    def engine_restarted(self) -> None:
        """Count a new engine in the place of one that failed."""
        self._restarts.inc()

    def first_token(self, generation: GenerationRecord) -> None:
        """See Meter."""
        seconds = generation.first_token_at - generation.began
        self._first_token.observe(seconds)
        self._stages.labels("first_token").observe(seconds)
        self._prompt_tokens.inc(generation.num_prompt_tokens)
        self._cached_tokens.inc(generation.num_cached_tokens)

    def tokens(self, num_tokens: int, gap_s: float | None) -> None:
        """See Meter."""
        self._generation_tokens.inc(num_tokens)
        if gap_s is not None:
            self._token_gap.observe(gap_s)

    def begin(self, record: RequestRecord) -> None:
        """See RequestObserver."""
        self._in_flight.labels(record.route).inc()

    def end(self, record: RequestRecord) -> None:
        """See RequestObserver."""
        self._in_flight.labels(record.route).dec()
        self._responses.labels(record.route, str(record.status)).inc()
        self._seconds.labels(record.route).observe(record.ended - record.began)
        if record.is_client_gone:
            self._gone.inc()
        if record.refusal is not None:
            self._refusals.labels(record.refusal).inc()
            if record.status in TURNED_AWAY:
                self._rejections.labels(*self._labels, record.refusal).inc()
        for seconds in record.clip_seconds:
            self._audio_s.inc(seconds)
            self._clips.inc()
        for num_bytes, container in record.files:
            self._files.labels(container).inc()
            self._file_bytes.inc(num_bytes)
        for stage in record.all_stages:
            self._stages.labels(stage.name).observe(stage.ended - stage.began)
        for generation in record.generations:
            self._end_generation(generation)

    def _end_generation(self, generation: GenerationRecord) -> None:
        for reason in generation.finish_reasons:
            self._ended.labels(*self._labels, FinishReason.STOP if reason == TOOL_CALLS else reason).inc()
        if not generation.first_token_at:
            return
        self._whole.observe(generation.last_token_at - generation.began)
        self._per_prompt.observe(generation.num_prompt_tokens)
        self._per_answer.observe(generation.num_tokens)
        self._max_tokens.observe(generation.sampling.max_tokens)
        self._choices.observe(generation.num_choices)
        self._stages.labels("detokenize").observe(generation.detokenize_s)
        num_gaps = generation.num_tokens / generation.num_choices - 1
        if num_gaps > 0:
            mean = (generation.last_token_at - generation.first_token_at) / num_gaps
            self._mean_gap.observe(mean)
            self._stages.labels("per_token").observe(mean)
        times = generation.times
        if times is not None:
            self._queue.observe(times.scheduled - times.queued)
            self._prefill.observe(times.first_token - times.scheduled)
            self._decode.observe(max(0.0, generation.last_token_at - times.first_token))
            self._inference.observe(max(0.0, generation.last_token_at - times.scheduled))

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Blocking: all metrics as text, in the format that an Accept header asks for. -> text, its content type."""
        if OPENMETRICS in accept.lower():
            text: bytes = openmetrics.generate_latest(self._lean, KEEP_NAMES)  # type: ignore[no-untyped-call]
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self._lean), CONTENT_TYPE_PLAIN_0_0_4
