"""Steps that overlap give what steps one after the other give, whatever is asked and whatever goes wrong."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.assembly import overlaps
from engine.client import EngineClient, InlineEngineClient
from engine.core import MAX_FAILED_STEPS, EngineCore
from engine.errors import EngineStartError
from engine.messages import (
    EngineArgs,
    EngineOutput,
    EngineRequest,
    FinishReason,
    SequenceId,
)
from engine.model_runner import PendingStep
from engine.plan import PlanInProgress, SchedulerOutput
from engine.scheduler import Scheduler
from tests.reference import Prompt, noise, special_id

EOS = special_id("<|im_end|>")
POISON = 777
SHORT, LONG = Prompt.of(5, 6, 7), Prompt.of(*range(10, 27))
AUDIO = Prompt.of(5, noise(30_001, seed=3), *range(40, 60))
TINY: dict[str, Any] = {"kv_cache_memory_bytes": 280_000, "max_num_batched_tokens": 40}


def requests() -> list[EngineRequest]:
    """Of every kind, and of different lengths, so that some end while others go on."""
    seeded: dict[str, Any] = {"temperature": 1.2, "seed": 7}
    greedy: dict[str, Any] = {"temperature": 0.0}
    return [
        SHORT.request("greedy", max_tokens=25, **greedy),
        AUDIO.request("greedy, audio", max_tokens=14, **greedy),
        LONG.request("one token", max_tokens=1, **greedy),
        SHORT.request("sampled", max_tokens=20, **seeded),
        LONG.request("top-k", max_tokens=17, top_k=20, top_p=0.9, **seeded),
        LONG.request("top-p", max_tokens=9, top_p=0.8, logprobs=3, **seeded),
        SHORT.request("penalties", max_tokens=22, repetition_penalty=1.3, frequency_penalty=0.3, logprobs=0,
                      temperature=0.0),
        SHORT.request("bias", max_tokens=6, logit_bias=((9, 50.0), (10, 49.5)), presence_penalty=1.0, **greedy),
        LONG.request("stops", max_tokens=40, stop_token_ids=tuple(range(0, 1500, 7)), **seeded),
        LONG.request("late", max_tokens=40, min_tokens=9, stop_token_ids=tuple(range(0, 1500, 3)), **seeded),
        SHORT.request("to the end", max_tokens=10_000, **seeded),
        SHORT.request("grammar", max_tokens=30, grammar="start: /(yes|no|nobody) +[a-z]+/", stop_token_ids=(EOS,),
                      **seeded),
        SHORT.request("complete", max_tokens=30, grammar="start: /(yes|no)/", stop_token_ids=(EOS,), **greedy),
        replace(AUDIO.request("choices", max_tokens=12, repetition_penalty=1.1, **seeded), n=3),
        replace(SHORT.request("chosen", max_tokens=15, stop_token_ids=tuple(range(0, 1500, 9)), **seeded), n=4),
    ]  # fmt: skip


@dataclass
class Answer:
    """What one choice gave."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ending: tuple[FinishReason, int | None] | None = None


def build(folder: Path, *, overlap: bool = True, **changes: Any) -> EngineCore:
    args = {"device": "cpu", "num_threads": 1, "max_model_len": 128, "async_scheduling": overlap, **changes}
    return EngineCore.build(EngineArgs(str(folder), **args))


def take(answers: dict[SequenceId, Answer], outputs: list[EngineOutput]) -> None:
    for output in outputs:
        answer = answers[output.sequence_id]
        assert answer.ending is None, "an answer goes on after its end"
        answer.tokens += output.new_token_ids
        answer.logprobs += [value for told in output.logprobs for value in (told.logprob, *dict(told.top).values())]
        if output.finish_reason:
            answer.ending = output.finish_reason, output.stop_token_id


def run(core: EngineCore, wanted: list[EngineRequest]) -> dict[SequenceId, Answer]:
    """To the end, all together, checking the books after each step."""
    answers: dict[SequenceId, Answer] = defaultdict(Answer)
    for request in wanted:
        core.add_request(request)
    while core.has_work:
        take(answers, core.step())
        core.scheduler.check_integrity()
    assert core.scheduler.blocks.usage == 0
    assert not core.runner.sampler.penalties._owners
    return answers


def assert_same(ours: dict[SequenceId, Answer], expected: dict[SequenceId, Answer]) -> None:
    assert ours.keys() == expected.keys()
    for key, answer in expected.items():
        assert (ours[key].tokens, ours[key].ending) == (answer.tokens, answer.ending), key
        assert ours[key].logprobs == pytest.approx(answer.logprobs, abs=1e-4), key


@pytest.fixture(scope="module")
def expected(gqa_folder: Path) -> dict[SequenceId, Answer]:
    answers = run(build(gqa_folder, overlap=False), requests())
    endings = {answer.ending[0] for answer in answers.values() if answer.ending}
    assert endings == {FinishReason.STOP, FinishReason.LENGTH}
    assert answers["complete", 0].ending == (FinishReason.STOP, None)
    return answers


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_num_batched_tokens": 23}, {"max_num_seqs": 3}, TINY],
    ids=["roomy", "chunks", "few", "tiny"],
)
def test_overlap_changes_no_answer(
    gqa_folder: Path, expected: dict[SequenceId, Answer], changes: dict[str, Any]
) -> None:
    core = build(gqa_folder, **changes)
    assert_same(run(core, requests()), expected)
    assert bool(core.stats.num_preemptions) == (changes is TINY)


def test_nor_does_what_the_prefix_cache_has_kept(gqa_folder: Path, expected: dict[SequenceId, Answer]) -> None:
    core = build(gqa_folder)
    run(core, requests())
    before = core.stats.prefix_cache_hits
    assert_same(run(core, requests()), expected)
    assert core.stats.prefix_cache_hits - before > 50


def test_nor_do_preemptions_at_any_moment(
    gqa_folder: Path, expected: dict[SequenceId, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = build(gqa_folder, max_num_batched_tokens=60)
    schedule = Scheduler.schedule
    steps = 0

    def rude(scheduler: Scheduler, in_flight: SchedulerOutput | None = None) -> SchedulerOutput:
        nonlocal steps
        steps += 1
        if steps % 4 == 0:
            for sequence in scheduler.running[steps % 3 :: 2]:
                scheduler._preempt(sequence, PlanInProgress(0, 0))
        return schedule(scheduler, in_flight)

    monkeypatch.setattr(Scheduler, "schedule", rude)
    assert_same(run(core, requests()), expected)
    assert core.stats.num_preemptions > 20


@pytest.mark.parametrize("seed", range(6))
def test_aborts_at_any_moment_leave_the_others(
    gqa_folder: Path, expected: dict[SequenceId, Answer], seed: int
) -> None:
    """Requests come, go and come again under the same id, between any two steps."""
    rng = random.Random(seed)
    core = build(gqa_folder, max_num_seqs=6, max_num_batched_tokens=rng.choice((30, 2048)))
    again = {request.request_id: request for request in requests()}
    waiting = list(again.values())
    rng.shuffle(waiting)
    answers: dict[SequenceId, Answer] = defaultdict(Answer)
    while core.has_work or waiting:
        for _ in range(rng.randrange(3)):
            if waiting:
                core.add_request(waiting.pop())
        running = sorted({key[0] for key, answer in answers.items() if answer.ending is None} & again.keys())
        if running and rng.random() < 0.3:
            gone = rng.choice(running)
            core.abort(gone)
            for key in [key for key in answers if key[0] == gone]:
                given = answers.pop(key).tokens
                assert given == expected[key].tokens[: len(given)]
            waiting.append(again.pop(gone))
        take(answers, core.step())
        core.scheduler.check_integrity()
    assert_same(answers, expected)


def test_one_choice_can_be_ended_while_a_step_is_in_flight(
    gqa_folder: Path, expected: dict[SequenceId, Answer]
) -> None:
    core = build(gqa_folder)
    answers: dict[SequenceId, Answer] = defaultdict(Answer)
    core.add_request(next(request for request in requests() if request.request_id == "choices"))
    while core.has_work:
        take(answers, core.step())
        if len(answers["choices", 1].tokens) == 5:
            core.abort("choices", 1)
    assert len(answers["choices", 1].tokens) == 5
    assert answers["choices", 0] == expected["choices", 0]
    assert answers["choices", 2] == expected["choices", 2]


def test_the_next_step_is_begun_before_the_result_is_taken(
    gqa_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = build(gqa_folder)
    happened: list[str] = []
    launch, sample, result = core.runner.launch, core.runner.sample, PendingStep.result

    def spy(name: str, function: Any) -> Any:
        def spied(*args: Any) -> Any:
            happened.append(name)
            return function(*args)

        return spied

    monkeypatch.setattr(core.runner, "launch", spy("launch", launch))
    monkeypatch.setattr(core.runner, "sample", spy("sample", sample))
    monkeypatch.setattr(PendingStep, "result", spy("result", result))
    run(core, [SHORT.request("r", max_tokens=3, temperature=0.0)])
    begin = ["launch", "sample"]
    # The last step is known to be the last: nothing is begun in its place.
    assert [name for name in happened if name] == [
        *begin, "launch", "result", "sample", "launch", "result", "sample", "launch", "result", "sample",
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["launch", "sample"])
def test_a_request_that_breaks_the_step_ends_alone(
    gqa_folder: Path, expected: dict[SequenceId, Answer], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    core = build(gqa_folder)
    function = getattr(core.runner, part)

    def brittle(given: Any, *rest: Any) -> Any:
        plan = given.plan if part == "sample" else given
        done = function(given, *rest)
        if any(POISON in item.sequence.token_ids for item in plan.scheduled):
            raise ZeroDivisionError("poison")
        return done

    monkeypatch.setattr(core.runner, part, brittle)
    answers: dict[SequenceId, Answer] = defaultdict(Answer)
    for request in requests():
        core.add_request(request)
    for _ in range(4):
        take(answers, core.step())
    core.add_request(Prompt.of(5, POISON, 6).request("poisoned"))
    while core.has_work:
        take(answers, core.step())
        core.scheduler.check_integrity()
    assert answers.pop(("poisoned", 0)).ending == (FinishReason.ERROR, None)
    assert_same(answers, expected)


def test_a_step_that_is_lost_in_flight_is_computed_again(
    gqa_folder: Path, expected: dict[SequenceId, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = build(gqa_folder)
    result = PendingStep.result
    steps = 0

    def brittle(step: PendingStep) -> Any:
        nonlocal steps
        steps += 1
        if steps == 7:
            raise RuntimeError("the device says so late")
        return result(step)

    monkeypatch.setattr(PendingStep, "result", brittle)
    assert_same(run(core, requests()), expected)
    assert steps > 7


def test_a_device_that_computes_nothing_ends_the_engine(gqa_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = build(gqa_folder)

    def broken(step: PendingStep) -> Any:
        raise RuntimeError("a sticky error")

    monkeypatch.setattr(PendingStep, "result", broken)
    core.add_request(SHORT.request("r"))

    def steps() -> None:
        for attempt in range(2 * MAX_FAILED_STEPS):
            core.step()
            if not core.has_work:
                core.add_request(SHORT.request(f"r{attempt}"))

    with pytest.raises(RuntimeError, match="sticky"):
        steps()


@pytest.mark.parametrize("raises", [False, True], ids=["not a number", "raises"])
def test_a_clip_that_fails_in_flight_fails_all_who_read_it(
    gqa_folder: Path, monkeypatch: pytest.MonkeyPatch, raises: bool
) -> None:
    """Others join while its encoder run is in flight; whoever needs other clips goes on."""
    bad = noise(16_000)
    bad[5] = float("nan")
    core = build(gqa_folder)
    encode = core.runner._encode_batch

    def strict(clips: Any) -> None:
        if raises and any(np.isnan(clip.samples).any() for clip in clips):
            raise ValueError("not a number")
        encode(clips)

    monkeypatch.setattr(core.runner, "_encode_batch", strict)
    answers: dict[SequenceId, Answer] = defaultdict(Answer)
    core.add_request(replace(Prompt.of(5, bad, 6).request("bad", max_tokens=5), n=2))
    core.add_request(AUDIO.request("good", max_tokens=5))
    take(answers, core.step())
    core.add_request(Prompt.of(8, 9, bad, 6).request("joins", max_tokens=5))
    while core.has_work:
        take(answers, core.step())
        core.scheduler.check_integrity()
    failed = {key for key, answer in answers.items() if answer.ending == (FinishReason.ERROR, None)}
    assert failed == {("bad", 0), ("bad", 1), ("joins", 0)}
    assert len(answers["good", 0].tokens) == 5


def test_through_a_client_that_leaves_in_the_middle(gqa_folder: Path, expected: dict[SequenceId, Answer]) -> None:
    async def collect(client: EngineClient, request: EngineRequest, most: int) -> list[int]:
        tokens: list[int] = []
        async for output in client.generate(request):
            tokens += output.new_token_ids
            if len(tokens) >= most:
                break
        return tokens

    async def main() -> None:
        args = EngineArgs(str(gqa_folder), device="cpu", num_threads=1, max_model_len=128, async_scheduling=True)
        client = await InlineEngineClient.start(args)
        try:
            assert client.info.async_scheduling
            single = [request for request in requests() if request.n == 1]
            given = await asyncio.gather(*(collect(client, r, 5 + 9 * (k % 2)) for k, r in enumerate(single)))
            for k, request in enumerate(single):
                assert given[k] == expected[request.request_id, 0].tokens[: 5 + 9 * (k % 2)]
            while client.stats.num_running or client.stats.kv_cache_usage:
                await asyncio.sleep(0.01)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_overlap_is_left_to_devices_that_compute_beside_the_host(gqa_folder: Path) -> None:
    args = EngineArgs(str(gqa_folder), device="cpu", num_threads=1, max_model_len=128)
    assert not EngineCore.build(args).info.async_scheduling


def test_drafts_leave_overlap_off(gqa_folder: Path) -> None:
    """Asked for by name it is refused, with a sentence."""
    args = EngineArgs(str(gqa_folder), device="cpu", num_threads=1, max_model_len=128, num_speculative_tokens=4)
    assert not overlaps(args, torch.device("cuda"))
    assert overlaps(replace(args, num_speculative_tokens=0), torch.device("cuda"))
    assert not EngineCore.build(args).info.async_scheduling
    with pytest.raises(EngineStartError, match="--async-scheduling and --num-speculative-tokens"):
        EngineCore.build(replace(args, async_scheduling=True))
