"""One log line for each request: short for people, with all that is known of it where lines are JSON.

Neither holds text, audio, URLs or keys.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

from server.observe.request_record import GenerationRecord, RequestRecord

PROBES = ("/health", "/ready", "/metrics")
"""Routes that are asked every few seconds: their lines are for debugging."""

logger = logging.getLogger("server.access")


class AccessLog:
    """A RequestObserver."""

    def begin(self, record: RequestRecord) -> None:
        """See RequestObserver."""

    def end(self, record: RequestRecord) -> None:
        """See RequestObserver. The line's `request` is for server/observe/logs.py's JSON."""
        logger.log(
            logging.DEBUG if record.route in PROBES else logging.INFO,
            "%s %r %d %.0fms %s",
            record.method,
            record.path,
            record.status,
            _ms(record.ended - record.began),
            record.request_id,
            extra={"request": fields_of(record)},
        )


def fields_of(record: RequestRecord) -> dict[str, Any]:
    """What the JSON line of a request says. Milliseconds; what is not known is left out."""
    fields = {
        "request_id": record.request_id,
        "key_id": record.key_id,
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "error": record.refusal,
        "client_gone": record.is_client_gone,
        "e2e_ms": _ms(record.ended - record.began),
        "stages_ms": _stages(record),
        **_audio(record),
        **_generations(record),
    }
    return {name: value for name, value in fields.items() if value is not None and value != {}}


def _stages(record: RequestRecord) -> dict[str, float]:
    """Sums: clips are loaded side by side, and windows of a recording are heard so."""
    sums: defaultdict[str, float] = defaultdict(float)
    for stage in record.all_stages:
        sums[stage.name] += stage.ended - stage.began
    for generation in record.generations:
        sums["detokenize"] += generation.detokenize_s
    return {name: _ms(seconds) for name, seconds in sums.items()}


def _audio(record: RequestRecord) -> dict[str, Any]:
    if not record.files and not record.clip_seconds:
        return {}
    return {
        "audio_count": len(record.clip_seconds),
        "audio_seconds": round(sum(record.clip_seconds), 3),
        "audio_formats": sorted({container for _, container in record.files}),
        "audio_bytes": sum(num_bytes for num_bytes, _ in record.files),
    }


def _generations(record: RequestRecord) -> dict[str, Any]:
    generations = record.generations
    if not generations:
        return {}
    first_token_s = record.first_token_s
    return {
        "model": record.model,
        "stream": record.is_stream,
        "prompt_tokens": sum(generation.num_prompt_tokens for generation in generations),
        "completion_tokens": sum(generation.num_tokens for generation in generations),
        "cached_tokens": sum(generation.num_cached_tokens for generation in generations),
        "ttft_ms": None if first_token_s is None else _ms(first_token_s),
        "queue_ms": max(map(_queue_ms, generations)),
        "finish_reason": _finish_reason(generations),
    }


def _queue_ms(generation: GenerationRecord) -> float:
    times = generation.times
    return _ms(times.scheduled - times.queued) if times else 0.0


def _finish_reason(generations: list[GenerationRecord]) -> str:
    """One word, or all there were."""
    return ",".join(sorted({reason for generation in generations for reason in generation.finish_reasons}))


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)
