"""/metrics: vLLM's names and ours, with the values that requests must leave behind."""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from engine.messages import EngineStats
from server.observe.metrics import OPENMETRICS

from .conftest import Served, Servers, audio_part, text_part, user, wav_base64

CHAT = "/v1/chat/completions"
STREAM = {"messages": [user("Hi")], "stream": True}
VLLM_NAMES = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:cache_config_info",
    "vllm:prompt_tokens", "vllm:prompt_tokens_cached", "vllm:generation_tokens", "vllm:request_success",
    "vllm:num_preemptions", "vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:mm_cache_queries",
    "vllm:mm_cache_hits", "vllm:admission_rejections", "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds", "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds", "vllm:request_inference_time_seconds", "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens", "vllm:request_params_n", "vllm:request_params_max_tokens",
    "vllm:iteration_tokens_total", "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens",
}  # fmt: skip

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scrape:
    """What one reading of /metrics says."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in parse_text(text)}
        self.samples: Samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        wanted = labels.items()
        return sum(value for (sample, has), value in self.samples.items() if sample == name and wanted <= has)


def scrape(served: Served, path: str = "/metrics", **headers: str) -> Scrape:
    response = served.client.get(served.url + path, headers=headers)
    assert response.status_code == 200
    return Scrape(response.text)


def settled(served: Served, is_so: Callable[[Scrape], bool]) -> Scrape:
    """A record is closed just after the last byte has gone out."""
    deadline = time.monotonic() + 5
    while not is_so(now := scrape(served)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_so(now)
    return now


@pytest.fixture
def own(servers: Servers) -> Any:
    """Starts servers for one test only: counters from zero."""
    return servers.start


def test_names_and_labels_are_vllms(own: Any) -> None:
    served = own()
    served.engine.stats = EngineStats(
        num_running=3, num_waiting=2, kv_cache_usage=0.25, num_preemptions=4, num_steps=6, prefix_cache_queries=100,
        prefix_cache_hits=60, num_draft_tokens=10, num_accepted_tokens=7, encoder_cache_queries=5,
        encoder_cache_hits=1, num_step_tokens=530, step_sizes=(1, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0),
    )  # fmt: skip
    found = scrape(served)
    assert found.families.keys() >= VLLM_NAMES
    assert not any(name.endswith("_created") for name in found.families)
    vllm = {dict(labels)["model_name"] for (name, labels) in found.samples if name.startswith("vllm:")}
    assert vllm == {"tiny-audio"}
    assert found("vllm:num_requests_running", engine="0") == 3
    assert found("vllm:num_requests_waiting") == 2
    assert found("vllm:kv_cache_usage_perc") == 0.25
    assert found("vllm:cache_config_info", block_size="16", num_gpu_blocks="1000") == 1
    assert found("vllm:num_preemptions_total") == 4
    assert (found("vllm:prefix_cache_queries_total"), found("vllm:prefix_cache_hits_total")) == (100, 60)
    assert (found("vllm:mm_cache_queries_total"), found("vllm:mm_cache_hits_total")) == (5, 1)
    assert found("vllm:spec_decode_num_accepted_tokens_total") == 7
    assert found("vllm:iteration_tokens_total_bucket", le="1.0") == 1
    assert found("vllm:iteration_tokens_total_bucket", le="2.0") == 3
    assert found("vllm:iteration_tokens_total_bucket", le="+Inf") == found("vllm:iteration_tokens_total_count") == 4
    assert found("vllm:iteration_tokens_total_sum") == 530
    assert found("tympan:engine_up") == 1
    served.engine.dead.set()
    assert scrape(served)("tympan:engine_up") == 0


def test_openmetrics_for_those_who_ask(served: Served) -> None:
    url = f"{served.url}/metrics"
    text = served.client.get(url)
    assert text.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    accept = f"{OPENMETRICS};version=1.0.0,text/plain;q=0.5"
    response = served.client.get(url, headers={"accept": accept})
    assert response.headers["content-type"].startswith(f"{OPENMETRICS}; version=1.0.0")
    assert {family.name for family in parse_openmetrics(response.text)} >= VLLM_NAMES


def test_a_request_is_counted_and_timed(own: Any) -> None:
    served = own()
    served.say("Hello there!", delay_s=0.02)
    started = time.monotonic()
    answer = served.post({"messages": [user(audio_part(1.5), text_part("Well?"))], "max_tokens": 100, "n": 2}).json()
    wall_s = time.monotonic() - started
    usage = answer["usage"]
    found = settled(served, lambda now: now("tympan:http_responses_total", route=CHAT) == 1)
    assert found("vllm:prompt_tokens_total") == found("vllm:request_prompt_tokens_sum") == usage["prompt_tokens"]
    assert found("vllm:prompt_tokens_cached_total") == 16
    num_tokens = usage["completion_tokens"]
    assert found("vllm:generation_tokens_total") == found("vllm:request_generation_tokens_sum") == num_tokens
    assert found("vllm:request_success_total", finished_reason="stop") == 2
    assert found("vllm:request_params_n_sum") == 2
    assert found("vllm:request_params_max_tokens_sum") == 100
    assert found("vllm:inter_token_latency_seconds_count") == num_tokens - 2
    assert found("vllm:inter_token_latency_seconds_sum") >= (num_tokens - 2) * 0.015
    first = found("vllm:time_to_first_token_seconds_sum")
    whole = found("vllm:e2e_request_latency_seconds_sum")
    assert 0.02 <= first < whole < wall_s
    assert found("vllm:request_decode_time_seconds_sum") == pytest.approx(whole - first, abs=0.01)
    inference = found("vllm:request_inference_time_seconds_sum")
    assert found("vllm:request_prefill_time_seconds_sum") == pytest.approx(0.02, abs=0.015)
    assert inference == pytest.approx(whole - first + 0.02, abs=0.02)
    assert found("tympan:audio_seconds_total") == 1.5
    assert found("tympan:audio_clips_total") == 1
    assert found("tympan:audio_files_total", format="wav") == 1
    assert found("tympan:audio_bytes_total") == len(base64.b64decode(wav_base64(1.5)))
    stages = {dict(labels)["stage"] for (name, labels) in found.samples if name == "tympan:stage_seconds_count"}
    assert stages == {
        "decode", "prompt", "grammar", "queue", "prefill", "first_token", "generate", "per_token", "detokenize",
    }  # fmt: skip
    assert 0 < found("tympan:stage_seconds_sum", stage="decode") < first
    assert found("tympan:http_responses_total", route=CHAT, status="200") == 1
    assert found("tympan:http_requests_in_flight", route=CHAT) == 0
    assert found("tympan:http_requests_in_flight", route="/metrics") == 1
    assert found("tympan:http_request_seconds_sum", route=CHAT) >= whole


def test_every_end_of_an_answer_is_counted(own: Any) -> None:
    served = own()
    served.say("one two three four five")
    assert served.post({"messages": [user("Hi")], "max_tokens": 2}).status_code == 200
    assert served.post({"messages": [user("Hi")], "stop": " two"}).status_code == 200
    served.say("one two three", failure=RuntimeError("bug"), fail_after=1)
    assert served.post({"messages": [user("Hi")], "n": 2}).status_code == 500
    served.say("one two three four five six", delay_s=0.2)
    with served.client.stream("POST", served.url + CHAT, json=STREAM) as response:
        lines = response.iter_lines()  # closes the response when it is collected
        next(lines)
        running = scrape(served)
        assert running("tympan:http_requests_in_flight", route=CHAT) == 1
    found = settled(served, lambda now: now("vllm:request_success_total") == 5)
    reasons = ("stop", "length", "error", "abort")
    ends = {reason: found("vllm:request_success_total", finished_reason=reason) for reason in reasons}
    assert ends == {"stop": 1, "length": 1, "error": 2, "abort": 1}
    assert found("tympan:clients_gone_total") == 1
    assert found("tympan:refusals_total", reason="500") == 1


def test_tokens_are_counted_while_a_stream_runs(own: Any) -> None:
    served = own()
    served.say("one two three four five six seven eight", delay_s=0.05)
    with served.client.stream("POST", served.url + CHAT, json=STREAM) as response:
        lines = response.iter_lines()
        for _ in range(8):
            next(lines)
        now = scrape(served)
        assert now("vllm:generation_tokens_total") >= 2
        assert now("vllm:time_to_first_token_seconds_count") == 1
        assert now("vllm:e2e_request_latency_seconds_count") == 0
        assert sum(1 for line in lines if line) > 2


def test_refusals_by_reason_and_routes_by_template(own: Any) -> None:
    served = own()
    served.say("Hi")
    served.post({"messages": [user("Hi")], "model": "other"})
    bad = {"type": "input_audio", "input_audio": {"data": "!", "format": "wav"}}
    served.post({"messages": [user(bad)]})
    served.post("{", "/v1/completions")
    for name in ("a", "b"):
        served.client.get(f"{served.url}/v1/files/{name}")
        served.client.get(f"{served.url}/{name}")
    served.client.request("BREW", f"{served.url}/{'x' * 1000}")
    found = settled(served, lambda now: now("tympan:http_responses_total", route="unknown") == 3)
    assert found("tympan:refusals_total", reason="model_not_found") == 1
    assert found("tympan:refusals_total", reason="invalid_base64") == 1
    assert found("tympan:refusals_total", reason="404") == 3
    assert found("tympan:http_responses_total", route="/v1/files/{file_id}", status="404") == 2
    assert found("tympan:http_responses_total", route="/v1/completions", status="400") == 1
    routes = {dict(labels)["route"] for (name, labels) in found.samples if name == "tympan:http_responses_total"}
    assert routes - {"/metrics"} == {CHAT, "/v1/completions", "/v1/files/{file_id}", "unknown"}


def test_who_is_turned_away_is_counted(own: Any) -> None:
    served = own()
    served.engine.dead.set()
    assert served.post({"messages": [user("Hi")]}).status_code == 503
    found = settled(served, lambda now: now("tympan:refusals_total") == 1)
    assert found("vllm:admission_rejections_total", reason="engine_unavailable", model_name="tiny-audio") == 1


def test_windows_of_a_recording_are_requests_of_their_own(own: Any) -> None:
    served = own(transcription_window_seconds=2)
    served.say("Hello")
    files = {"file": ("a.wav", base64.b64decode(wav_base64(7.0)))}
    path = "/v1/audio/transcriptions"
    assert served.client.post(served.url + path, files=files).status_code == 200
    found = settled(served, lambda now: now("tympan:http_responses_total", route=path) == 1)
    num_windows = len(served.engine.requests)
    assert num_windows >= 4
    assert found("vllm:request_success_total", finished_reason="stop") == num_windows
    assert found("tympan:audio_clips_total") == num_windows
    assert found("tympan:audio_seconds_total") == pytest.approx(7.0)
    assert found("tympan:stage_seconds_count", stage="decode") >= num_windows


def test_the_key_opens_metrics(own: Any) -> None:
    served = own(api_key=("one",))
    assert served.client.get(f"{served.url}/metrics").status_code == 401
    found = scrape(served, authorization="Bearer one")
    assert found("tympan:refusals_total", reason="401") == 1


def test_restarts_are_counted(own: Any) -> None:
    served = own()
    assert scrape(served)("tympan:engine_restarts_total") == 0
    served.metrics.engine_restarted()
    assert scrape(served)("tympan:engine_restarts_total") == 1


def test_version_and_load(own: Any) -> None:
    served = own()
    version = served.client.get(f"{served.url}/version").json()
    assert version.keys() == {"version"}
    assert version["version"].split(".")[0].isdigit()
    assert served.client.get(f"{served.url}/load").json() == {"server_load": 0}
    served.say("one two three", delay_s=0.2)
    running = threading.Thread(target=lambda: served.post({"messages": [user("Hi")]}))
    running.start()
    deadline = time.monotonic() + 5
    while not served.engine.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.client.get(f"{served.url}/load").json() == {"server_load": 1}
    running.join(10)


def test_scrapes_are_no_news(own: Any, caplog: pytest.LogCaptureFixture) -> None:
    served = own()
    with caplog.at_level(logging.INFO):
        scrape(served)
        httpx.get(f"{served.url}/nothing")
        deadline = time.monotonic() + 5
        while "GET '/nothing'" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = [record.getMessage() for record in caplog.records if record.name == "server.access"]
    assert [line.split()[1] for line in lines] == ["'/nothing'"]
