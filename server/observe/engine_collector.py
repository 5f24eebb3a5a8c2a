"""The engine's own counters as metrics, read when somebody asks. Names and labels are vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engine.errors import EngineDeadError
from engine.step_sizes import STEP_SIZE_BOUNDS

if TYPE_CHECKING:
    from engine.client import EngineClient

LABELS = ("model_name", "engine")


class EngineCollector(Collector):
    """Reads an engine's latest snapshot, from any thread. Its counters begin anew when the engine does."""

    def __init__(self, engine: EngineClient, labels: tuple[str, str]) -> None:
        self._engine = engine
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        """All families."""
        stats, info = self._engine.stats, self._engine.info
        yield self._gauge("num_requests_running", "Answers that are being computed.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Answers that wait for their turn.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.", stats.kv_cache_usage)
        config = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache: blocks, and tokens of each.",
            labels=[*LABELS, "block_size", "num_gpu_blocks"],
        )
        config.add_metric([*self._labels, str(info.block_size), str(info.num_blocks)], 1)
        yield config
        for name, text, value in (
            ("num_preemptions", "Answers that had to make room and were computed again.", stats.num_preemptions),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Tokens found there.", stats.prefix_cache_hits),
            ("mm_cache_queries", "Clips looked up in the encoder cache.", stats.encoder_cache_queries),
            ("mm_cache_hits", "Clips found there.", stats.encoder_cache_hits),
            ("spec_decode_num_draft_tokens", "Guessed tokens that were verified.", stats.num_draft_tokens),
            ("spec_decode_num_accepted_tokens", "Guesses that came true.", stats.num_accepted_tokens),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        yield self._step_sizes(stats.step_sizes, stats.num_step_tokens)
        yield GaugeMetricFamily("tympan:engine_up", "1 while the engine serves, else 0.", value=self._is_up())

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
        gauge.add_metric(self._labels, value)
        return gauge

    def _step_sizes(self, counts: tuple[int, ...], num_tokens: int) -> Metric:
        bounds = [*map(float, STEP_SIZE_BOUNDS), float("inf")]
        sums = accumulate(counts or [0] * len(bounds))
        family = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step.", labels=LABELS)
        buckets = zip(map(floatToGoString, bounds), sums, strict=True)
        family.add_metric(self._labels, list(buckets), num_tokens)
        return family

    def _is_up(self) -> int:
        try:
            self._engine.check_health()
        except EngineDeadError:
            return 0
        return 1
