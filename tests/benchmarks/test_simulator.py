"""The simulator: nothing gets lost in it, a seed decides everything, short cuts change nothing, units are right."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cost_model import H200_BF16, H200_BF16_FLOOR, LinearCost, StepWork, find_cost_model, work_of
from benchmarks.load_models import ClosedLoad, OpenLoad, Together
from benchmarks.simulation import Fleet, Flight, FrontCost, Limits, Router
from benchmarks.simulator import CHECKED, disagreements, predict
from benchmarks.summary import summarise
from benchmarks.workload import Job, Mix, engine_request, fixed_mix, poisson, read_trace, write_trace
from engine.device import CPU_TOKEN_BUDGET
from engine.messages import EngineArgs
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from model.config import Qwen2AudioConfig, TextConfig

ROOT = Path(__file__).parent.parent.parent
SMALL = Limits(max_num_seqs=6, max_num_batched_tokens=512, kv_cache_tokens=4096)
"""Small enough that requests wait, and are preempted."""


def brief(flight: Flight) -> tuple[object, ...]:
    return flight.job, flight.replica, flight.sent, flight.ready, flight.first_token, flight.last_token


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    users=st.integers(1, 20),
    replicas=st.integers(1, 3),
    policy=st.sampled_from(Router.POLICIES),
    think_s=st.sampled_from([0.0, 1.0]),
)
def test_every_request_ends_once_with_all_its_tokens(
    seed: int, users: int, replicas: int, policy: str, think_s: float
) -> None:
    fleet = Fleet(H200_BF16, SMALL, num_replicas=replicas, router=policy, front=FrontCost(cores=2), seed=seed)
    load = ClosedLoad(Mix(), users, think_s=think_s, max_requests=40, seed=seed)
    sent: list[Job] = []
    ask = load._ask

    def note(user: int, at: float) -> tuple[float, Job] | None:
        timed = ask(user, at)
        if timed:
            sent.append(timed[1])
        return timed

    load._ask = note  # type: ignore[method-assign]
    done = fleet.run(load)
    assert len(sent) == 40
    assert Counter(flight.job for flight in done) == Counter(sent)
    for flight in done:
        assert flight.num_tokens == flight.job.output_tokens
        assert flight.first_token is not None
        assert flight.sent < flight.ready < flight.first_token <= flight.last_token
    assert fleet.router.in_flight == [0] * replicas
    for replica in fleet.replicas:
        replica.scheduler.check_integrity()
        assert not replica.scheduler.has_work
    gaps = sum(sum(replica.gaps.counts) for replica in fleet.replicas)
    assert gaps == sum(flight.num_tokens - 1 for flight in done)
    total = summarise(fleet, None)
    assert total["output_tokens_per_s"] * fleet.now == pytest.approx(sum(job.output_tokens for job in sent))


@pytest.mark.parametrize("limits", [SMALL, Limits(), Limits(max_num_seqs=4)])
def test_steps_taken_at_once_change_nothing(limits: Limits) -> None:
    def run(fast_forward: bool) -> tuple[Fleet, list[tuple[object, ...]]]:
        fleet = Fleet(H200_BF16, limits, num_replicas=2, front=FrontCost(), fast_forward=fast_forward)
        done = fleet.run(ClosedLoad(Mix(), 14, seconds=6.0, think_s=0.5, seed=3))
        return fleet, sorted(map(brief, done), key=str)

    (slow, expected), (fast, found) = run(False), run(True)
    assert found == expected
    assert [r.num_steps for r in fast.replicas] == [r.num_steps for r in slow.replicas]
    assert [r.scheduler.stats.num_preemptions for r in fast.replicas] == [
        r.scheduler.stats.num_preemptions for r in slow.replicas
    ]
    assert summarise(fast, None)["inter_token_latency_s"] == pytest.approx(
        summarise(slow, None)["inter_token_latency_s"]
    )
    assert fast.replicas[0].scheduler.stats.num_steps < slow.replicas[0].scheduler.stats.num_steps


def test_later_turns_find_what_the_prefix_cache_has() -> None:
    def run(enable_prefix_caching: bool) -> Fleet:
        fleet = Fleet(H200_BF16, Limits(enable_prefix_caching=enable_prefix_caching))
        fleet.run(ClosedLoad(Mix(multi_turn_share=0.8), 4, max_requests=60, seed=1))
        return fleet

    with_cache, without = run(True), run(False)
    found, asked = (
        getattr(with_cache.replicas[0].scheduler.stats, f"prefix_cache_{name}") for name in ("hits", "queries")
    )
    assert found > asked / 3
    assert without.replicas[0].scheduler.stats.prefix_cache_hits == 0
    assert with_cache.now < without.now


def test_a_cache_that_is_too_small_preempts() -> None:
    fleet = Fleet(H200_BF16, Limits(kv_cache_tokens=8192))
    fleet.run(ClosedLoad(fixed_mix(10.0, 50, 400), 32, max_requests=64))
    assert summarise(fleet, None)["num_preemptions"] > 0


def test_the_seed_decides_everything() -> None:
    def run(seed: int) -> list[tuple[object, ...]]:
        fleet = Fleet(H200_BF16, Limits(), num_replicas=3, router="power_of_two", front=FrontCost(), seed=seed)
        return [brief(flight) for flight in fleet.run(OpenLoad(poisson(Mix(), 20.0, 5.0, seed)))]

    assert run(7) == run(7)
    assert run(7) != run(8)


def decodes(batch: int, context: int = 1000) -> StepWork:
    return StepWork(1, batch, batch, batch, batch * context)


@pytest.mark.parametrize(
    ("batch", "floor_ms", "realistic_ms"),
    [(1, 3.43, 4.4), (8, 4.29, 5.4), (32, 7.21, 8.9), (64, 11.1, 13.5), (128, 18.9, 22.8), (256, 35.9, 44.6)],
)
def test_decode_steps_cost_what_the_roofline_table_says(batch: int, floor_ms: float, realistic_ms: float) -> None:
    """Qwen2-Audio-7B, bf16, 4.3 TB/s, contexts of 1000 tokens; worked out by hand before there was a simulator."""
    assert 1000 * H200_BF16_FLOOR.step_seconds(decodes(batch)) == pytest.approx(floor_ms, rel=0.01)
    assert 1000 * H200_BF16.step_seconds(decodes(batch)) == pytest.approx(realistic_ms, rel=0.01)


@pytest.mark.parametrize(("chunk", "expected_ms"), [(256, 17.6), (512, 24), (800, 32), (2048, 67)])
def test_mixed_steps_cost_what_the_roofline_says(chunk: int, expected_ms: float) -> None:
    mixed = decodes(64)._replace(num_tokens=64 + chunk, num_sequences=65, num_sampled=65)
    assert 1000 * H200_BF16.step_seconds(mixed) == pytest.approx(expected_ms, rel=0.08)


def test_a_prompt_of_30_s_costs_what_the_roofline_says() -> None:
    """800 tokens: 10.53 TFLOP of the decoder, 2.28 of the encoder (its convolutions, 1 %, are left out)."""
    scheduler = Limits().scheduler(H200_BF16.frame_cost)
    scheduler.add(Sequence(engine_request(Job((30.0,), 50, 1), "a"), seed=0))
    work = work_of(scheduler.schedule())
    assert work == StepWork(1, 800, 1, 1, 800, 800 * 801 // 2, 1, 1500, 1500**2)
    decoder = work._replace(num_sampled=0, num_clips=0, encoder_frames=0, encoder_pairs=0)
    assert H200_BF16_FLOOR.step_seconds(decoder) * 780e12 == pytest.approx(10.53e12, rel=0.02)
    encoder = H200_BF16_FLOOR.step_seconds(work._replace(num_sampled=0)) - H200_BF16_FLOOR.step_seconds(decoder)
    assert encoder * 780e12 == pytest.approx(2.28e12, rel=0.02)


def test_fitted_prices_survive_their_file(tmp_path: Path) -> None:
    cost = LinearCost(tuple(float(price) for price in range(1, 10)), "here", frame_cost=0.4)
    cost.save(tmp_path / "cost.json")
    assert find_cost_model(str(tmp_path / "cost.json")) == cost
    assert LinearCost.from_document(cost.document()) == cost
    assert cost.step_seconds(StepWork(1, 2, 0, 0, 0, 0, 0, 0, 3)) == 1 + 2 * 2 + 3 * 9
    (tmp_path / "other.json").write_text('{"seconds": {"num_tokens": 1}}')
    with pytest.raises(ValueError, match="no cost model"):
        find_cost_model(str(tmp_path / "other.json"))


def test_what_was_measured_on_a_cpu_is_what_todays_scheduler_is_predicted_to_do() -> None:
    document = json.loads((ROOT / "benchmarks/results/cpu/simulation.json").read_text(encoding="utf-8"))
    cost, limits = LinearCost.from_document(document["prices"]), Limits(**document["limits"])
    rows = document["rows"]
    assert [(row["users"], row["clip_seconds"], row["requests"]) for row in rows] == list(CHECKED)
    again = [
        {**row, "predicted": predict(cost, limits, row["users"], row["clip_seconds"], row["requests"])}
        for row in rows
    ]
    assert disagreements(again) == []


@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.4, True), (1.6, False), (0.6, False)])
def test_a_prediction_that_is_too_far_off_is_named(factor: float, agrees: bool) -> None:
    figures = {"requests_per_s": 4.0, "ttft_s": {"mean": 0.2}, "inter_token_latency_s": {"mean": 0.01}}
    measured = {**figures, "ttft_s": {"mean": 0.2 / factor}}
    row = {"users": 4, "clip_seconds": 2.0, "predicted": figures, "measured": measured}
    named = [f"TTFT mean at 4 users, 2 s: predicted 0.2, measured {0.2 / factor:.3g}"]
    assert disagreements([row]) == ([] if agrees else named)


def test_the_scheduler_counts_encoding_as_the_engines_does() -> None:
    published = Qwen2AudioConfig(text=TextConfig(intermediate_size=11008))
    (replica,) = Fleet(H200_BF16, Limits()).replicas
    assert replica.scheduler.frame_cost == pytest.approx(published.frame_cost, rel=0.02)
    assert 3000 * published.frame_cost < CPU_TOKEN_BUDGET / 3  # 30 s: the smallest chunk has room for it


@pytest.mark.parametrize("name", ["long_prefill_token_threshold", "max_encoder_frames", "enable_prefix_caching"])
def test_what_is_simulated_has_the_engines_defaults(name: str) -> None:
    assert getattr(Limits(), name) == getattr(EngineArgs("folder"), name)


def test_a_trace_comes_back_as_it_was_written(tmp_path: Path) -> None:
    jobs = poisson(Mix(), 5.0, 5.0, seed=1)
    write_trace(tmp_path / "trace.jsonl", jobs)
    read = read_trace(tmp_path / "trace.jsonl")
    assert [(job.arrival, job.clip_seconds, job.prompt_tokens, job.output_tokens) for job in read] == [
        (job.arrival, job.clip_seconds, job.prompt_tokens, job.output_tokens) for job in jobs
    ]
    fleet = Fleet(H200_BF16, Limits())
    assert len(fleet.run(OpenLoad(read))) == len(jobs)


@pytest.mark.parametrize(
    "line",
    ["{", "7", '{"output_tokens": 3}', '{"prompt_tokens": 9, "clip_seconds": 30, "output_tokens": 1}',
     '{"prompt_tokens": 900, "clip_seconds": 31, "output_tokens": 1}', '{"prompt_tokens": 9, "output_tokens": 0}'],
)  # fmt: skip
def test_a_trace_that_makes_no_sense_is_refused_by_its_line(tmp_path: Path, line: str) -> None:
    good = json.dumps({"prompt_tokens": 300, "clip_seconds": 10, "output_tokens": 4})
    (tmp_path / "trace.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        read_trace(tmp_path / "trace.jsonl")


def test_a_servers_log_is_a_trace(tmp_path: Path) -> None:
    page = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
    line = json.loads(page.split("```json\n")[1].split("```")[0])
    later = {**line, "ts": "2026-11-24T23:59:14.345Z"}
    file = {"route": "/v1/audio/transcriptions", "audio_count": 3, "audio_seconds": 72.0, "prompt_tokens": 2100}
    silent = {"ts": "2026-11-24T23:59:11.345Z", "level": "info", "logger": "server.lifecycle", "message": "ready"}
    lines = [silent, line, {**line, "status": 400, "completion_tokens": 0}, {**later, **file}]
    (tmp_path / "server.log").write_text("".join(json.dumps(one) + "\n" for one in lines))
    asked, *windows = read_trace(tmp_path / "server.log")
    assert (asked.clip_seconds, asked.prompt_tokens, asked.output_tokens) == ((4.5,), 143, 22)
    assert asked.arrival == pytest.approx(1.0 - 0.4126)
    assert [(one.clip_seconds, one.prompt_tokens, one.output_tokens) for one in windows] == [((24.0,), 700, 7)] * 3
    assert windows[0].arrival - asked.arrival == pytest.approx(2.0)
    fleet = Fleet(H200_BF16, Limits())
    assert len(fleet.run(OpenLoad(read_trace(tmp_path / "server.log")))) == 4
    assert not fleet.replicas[0].scheduler.stats.prefix_cache_hits


def test_later_turns_repeat_what_was_said() -> None:
    jobs = list(itertools.islice(Mix(multi_turn_share=0.8).jobs(0, seed=2), 200))
    turns = [(last, job) for last, job in itertools.pairwise(jobs) if job.turn]
    assert turns
    for last, job in turns:
        before, after = engine_request(last, "a"), engine_request(job, "b")
        assert after.prompt_token_ids[: last.prompt_tokens] == before.prompt_token_ids
        assert [clip.content_hash for clip in after.clips] == [clip.content_hash for clip in before.clips]
        assert job.prompt_tokens > last.prompt_tokens + last.output_tokens
    assert all(job.conversation != last.conversation for last, job in itertools.pairwise(jobs) if not job.turn)


def test_loads_run_together_and_stay_apart() -> None:
    loads = {
        "users": ClosedLoad(Mix(), 3, max_requests=9),
        "huge": OpenLoad([Job((), 5000, 4, arrival=0.1, user=-1)]),
    }
    done = Fleet(H200_BF16, Limits()).run(Together(loads))
    assert Counter(flight.job.kind for flight in done) == {"users": 9, "huge": 1}


def jobs_of(count: int) -> list[Job]:
    return [Job((1.0,), 40, 1, conversation=number) for number in range(count)]


@given(replicas=st.integers(1, 12), count=st.integers(0, 60))
def test_routers_balance(replicas: int, count: int) -> None:
    for policy in ("round_robin", "least_loaded"):
        router = Router(policy, replicas)
        for job in jobs_of(count):
            router.choose(job)
        assert max(router.in_flight) - min(router.in_flight) <= 1


@given(st.lists(st.integers(0, 20), min_size=2, max_size=10))
def test_the_least_loaded_is_chosen(in_flight: list[int]) -> None:
    router = Router("least_loaded", len(in_flight))
    router.in_flight = list(in_flight)
    assert in_flight[router.choose(jobs_of(1)[0])] == min(in_flight)


def test_the_best_of_two_is_nearly_as_good_and_a_conversation_stays_where_it_is() -> None:
    two, hashed = Router("power_of_two", 16, seed=1), Router("conversation_hash", 16)
    for job in jobs_of(1600):
        two.choose(job)
        assert hashed.choose(job) == hashed.choose(job)
    assert max(two.in_flight) <= 108
    assert min(hashed.in_flight) > 0
    with pytest.raises(ValueError, match="round_robin"):
        Router("by guess", 2)


def test_more_cores_in_front_make_first_tokens_earlier() -> None:
    def front_p95(cores: int) -> float:
        fleet = Fleet(H200_BF16, Limits(), front=FrontCost(cores, s_per_audio_second=0.02))
        fleet.run(OpenLoad(poisson(fixed_mix(10.0, 50, 8), 8.0, 10.0, seed=0)))
        return summarise(fleet, None)["front_s"]["p95"]

    assert front_p95(1) > 3 * front_p95(4)
    assert front_p95(4) >= 0.2 - 1e-9


def test_the_command_line_simulates_without_torch() -> None:
    script = (
        "import runpy, sys\n"
        "sys.argv = ['simulator', 'run', '--users', '20', '--seconds', '8', '--warmup', '2']\n"
        "runpy.run_module('benchmarks.simulator', run_name='__main__')\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    (row,) = document["rows"]
    assert row["requests_per_s"] > 0.5
    assert row["num_preemptions"] == 0


def test_a_scheduler_of_the_engine_is_what_runs() -> None:
    assert type(Fleet(H200_BF16, Limits()).replicas[0].scheduler) is Scheduler
