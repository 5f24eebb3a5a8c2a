"""What the load generator makes of its outcomes."""

from __future__ import annotations

import pytest

from tympan.load import LoadPlan, Outcome, make_wav, summarise


def test_figures_come_from_the_requests_that_succeeded() -> None:
    outcomes = [
        Outcome(10.0, ttft=1.0, end_to_end=4.0, gaps=[1.0, 2.0], num_tokens=4, prompt_tokens=300),
        Outcome(10.0, ttft=2.0, end_to_end=8.0, gaps=[3.0, 3.0], num_tokens=4, prompt_tokens=300),
        Outcome(10.0, error="HTTP 500"),
    ]
    figures = summarise(LoadPlan(output_tokens=4), "m", outcomes, wall=10.0)
    assert (figures["requests"], figures["num_errors"], figures["errors"]) == (3, 1, ["HTTP 500"])
    assert figures["requests_per_s"] == pytest.approx(0.2)
    assert figures["output_tokens_per_s"] == pytest.approx(0.8)
    assert figures["audio_seconds_per_s"] == pytest.approx(2.0)
    assert figures["prompt_tokens"] == 300
    assert figures["ttft_s"]["mean"] == pytest.approx(1.5)
    assert figures["time_per_output_token_s"]["mean"] == pytest.approx(1.5)  # (3 / 3 + 6 / 3) / 2
    assert figures["inter_token_latency_s"]["p99"] == 3.0


def test_a_run_without_an_answer_has_no_times() -> None:
    figures = summarise(LoadPlan(), "m", [Outcome(2.0, error="refused")], wall=1.0)
    assert figures["requests_per_s"] == 0
    assert figures["ttft_s"]["p50"] is None


def test_clips_differ_by_seed_alone() -> None:
    assert make_wav(0.1, 1) == make_wav(0.1, 1) != make_wav(0.1, 2)
