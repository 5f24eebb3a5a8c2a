"""What a real server tells of real requests: metrics on both ports, and its log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.integration.conftest import ServerProcess, start_server, text
from tests.integration.test_bundled import DIGITS, clip, user

QUESTION = "What does the person say?"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    started = start_server("--metrics-port", "0", "--log-json", "--api-key", "none")
    yield started
    assert started.stop() == 0


def json_lines(server: ServerProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in [*server.lines] if line.startswith("{")]


def metrics_url(server: ServerProcess) -> str:
    found = [re.fullmatch(r"metrics on port (\d+)", line.get("message", "")) for line in json_lines(server)]
    [port] = [match[1] for match in found if match]
    return f"http://127.0.0.1:{port}/metrics"


def samples(url: str) -> dict[str, float]:
    """Sums over the labels but the stage."""
    sums: dict[str, float] = {}
    for family in parse(httpx.get(url).text):
        for sample in family.samples:
            name = f"{sample.name}/{sample.labels['stage']}" if "stage" in sample.labels else sample.name
            sums[name] = sums.get(name, 0) + sample.value
    return sums


def test_real_requests_leave_real_values(server: ServerProcess) -> None:
    started = time.monotonic()
    usages = []
    for _ in range(2):
        answer = server.openai.chat.completions.create(
            model="tympan-tiny", messages=[user(clip(DIGITS), text(QUESTION))]  # type: ignore[list-item]
        )  # fmt: skip
        usages.append(answer.usage)
    wall_s = time.monotonic() - started
    deadline = time.monotonic() + 10
    while (found := samples(metrics_url(server)))["tympan:stage_seconds_count/generate"] < 2:
        assert time.monotonic() < deadline
    prompt, cached, completion = (
        sum(getattr(usage, name) for usage in usages) if "." not in name
        else sum(usage.prompt_tokens_details.cached_tokens or 0 for usage in usages)
        for name in ("prompt_tokens", "details.cached_tokens", "completion_tokens")
    )  # fmt: skip
    assert found["vllm:prompt_tokens_total"] == prompt
    assert found["vllm:prompt_tokens_cached_total"] == cached == found["vllm:prefix_cache_hits_total"] > 0
    assert found["vllm:generation_tokens_total"] == completion
    assert found["vllm:iteration_tokens_total_sum"] == prompt - cached + completion - len(usages)
    assert found["vllm:mm_cache_queries_total"] >= 1
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert found["tympan:engine_up"] == 1
    for stage in ("decode", "prompt", "queue", "prefill", "generate", "detokenize"):
        assert found[f"tympan:stage_seconds_count/{stage}"] == 2
        assert 0 < found[f"tympan:stage_seconds_sum/{stage}"] < wall_s
    assert found["tympan:stage_seconds_count/encode"] >= 1
    assert 0 < found["tympan:stage_seconds_sum/encode"] < found["tympan:stage_seconds_sum/prefill"]
    in_engine = found["vllm:request_queue_time_seconds_sum"] + found["vllm:request_inference_time_seconds_sum"]
    assert in_engine <= found["vllm:e2e_request_latency_seconds_sum"] < wall_s
    lines = [line for line in json_lines(server) if line.get("route") == "/v1/chat/completions"]
    assert sum(line["prompt_tokens"] for line in lines) == prompt
    assert all(line["stages_ms"]["prefill"] <= line["ttft_ms"] <= line["e2e_ms"] for line in lines)
    assert not any(QUESTION in line for line in server.lines)


def test_only_the_second_port_needs_no_key(server: ServerProcess) -> None:
    url = metrics_url(server)
    assert httpx.get(url).status_code == 200
    assert httpx.get(url.replace("/metrics", "/v1/models")).status_code == 404
    assert server.http.get("/metrics").status_code == 401
    assert server.http.get("/metrics", headers={"authorization": "Bearer none"}).status_code == 200


def test_all_that_is_logged_is_json(server: ServerProcess) -> None:
    """Of whichever process: an engine without trouble says nothing (tests/server/test_logs.py lets one speak)."""
    assert {"server"} <= {line["process"] for line in json_lines(server)} <= {"server", "engine"}
    assert not [line for line in server.lines if re.match(r"\d{4}-\d\d-\d\d ", line)]
