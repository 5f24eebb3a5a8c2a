"""Several choices of one request: the tokens that each would have alone, with the prompt computed once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.client import InlineEngineClient
from engine.core import EngineCore
from engine.errors import RequestError
from engine.messages import EngineArgs, EngineRequest, FinishReason, SequenceId
from engine.plan import PlanInProgress, SchedulerOutput
from engine.scheduler import Scheduler
from engine.sequence import choice_seed
from tests.reference import Prompt, noise

PROMPTS = {
    "short": Prompt.of(5, 6, 7),
    "one token": Prompt.of(5),
    "a whole block": Prompt.of(*range(10, 26)),
    "a block and a token": Prompt.of(*range(10, 27)),
    "long, with audio": Prompt.of(5, noise(30_001, seed=3), *range(40, 60)),
    "audio last": Prompt.of(5, 6, noise(12_345, seed=5)),
}
SEEDED: dict[str, Any] = {"temperature": 1.3, "seed": 11, "max_tokens": 10, "min_tokens": 10}
Tokens = dict[SequenceId, list[int]]


def build(folder: Path, **changes: Any) -> EngineCore:
    return EngineCore.build(
        EngineArgs(str(folder), **{"device": "cpu", "num_threads": 1, "max_model_len": 256, **changes})
    )


def requests(n: int, **sampling: Any) -> list[EngineRequest]:
    return [replace(prompt.request(name, **sampling), n=n) for name, prompt in PROMPTS.items()]


def run(core: EngineCore, wanted: list[EngineRequest]) -> Tokens:
    """To the end, all together, checking the books after each step."""
    tokens: Tokens = defaultdict(list)
    for request in wanted:
        core.add_request(request)
    while core.has_work:
        for output in core.step():
            assert output.finish_reason in (None, FinishReason.LENGTH), output.error
            tokens[output.sequence_id] += output.new_token_ids
        core.scheduler.check_integrity()
    return tokens


def alone(core: EngineCore, n: int, **sampling: Any) -> Tokens:
    """What each choice gives as the only one of a request with its seed."""
    expected: Tokens = {}
    for name, prompt in PROMPTS.items():
        for index in range(n):
            seed = choice_seed(sampling["seed"], index)
            given = run(core, [prompt.request(name, **{**sampling, "seed": seed})])
            expected[name, index] = given[name, 0]
    return expected


@pytest.fixture(scope="module")
def expected(gqa_folder: Path) -> Tokens:
    return alone(build(gqa_folder), 4, **SEEDED)


def test_choices_differ_and_the_first_has_the_requests_seed(expected: Tokens) -> None:
    assert choice_seed(11, 0) == 11
    assert all(-(1 << 63) <= choice_seed(seed, index) < 1 << 63 for seed in (-5, 0, 2**63 - 1) for index in range(9))
    for name in PROMPTS:
        assert len({tuple(expected[name, index]) for index in range(4)}) == 4


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 1}, {"max_num_seqs": 3, "max_num_batched_tokens": 23}],
    ids=str,
)
def test_seeded_choices_are_what_they_are_alone(gqa_folder: Path, expected: Tokens, changes: dict[str, int]) -> None:
    assert run(build(gqa_folder, **changes), requests(4, **SEEDED)) == expected


def test_seeded_choices_after_preemptions(
    gqa_folder: Path, expected: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = build(gqa_folder, max_num_batched_tokens=30, max_num_seqs=5)
    schedule = Scheduler.schedule
    steps = 0

    def rude(scheduler: Scheduler) -> SchedulerOutput:
        nonlocal steps
        steps += 1
        if steps % 5 == 0:
            for sequence in scheduler.running[steps % 3 :: 2]:
                scheduler._preempt(sequence, PlanInProgress(0, 0))
        return schedule(scheduler)

    monkeypatch.setattr(Scheduler, "schedule", rude)
    assert run(core, requests(4, **SEEDED)) == expected
    assert core.stats.num_preemptions > 10


def test_greedy_choices_with_penalties_are_all_alike(gqa_folder: Path) -> None:
    params: dict[str, Any] = {"max_tokens": 12, "min_tokens": 12, "temperature": 0.0, "seed": 0}
    params |= {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4}
    core = build(gqa_folder, max_num_seqs=4)
    single = alone(core, 1, **params)
    assert run(core, requests(3, **params)) == {
        (name, index): tokens for (name, _), tokens in single.items() for index in range(3)
    }


@pytest.mark.parametrize("max_num_seqs", [64, 3, 1])
def test_the_prompt_is_computed_once(gqa_folder: Path, monkeypatch: pytest.MonkeyPatch, max_num_seqs: int) -> None:
    """Each further choice computes the prompt's last token; one that waited for a slot, the rest of a block."""
    core = build(gqa_folder, max_num_seqs=max_num_seqs)
    execute = core.runner.execute
    num_computed = 0

    def counted(plan: SchedulerOutput) -> Any:
        nonlocal num_computed
        num_computed += sum(item.num_tokens for item in plan.scheduled)
        return execute(plan)

    monkeypatch.setattr(core.runner, "execute", counted)
    request = replace(PROMPTS["long, with audio"].request("r", **SEEDED), n=9)
    run(core, [request])
    length = len(request.prompt_token_ids)
    least = length + 8 + 9 * (SEEDED["max_tokens"] - 1)
    num_rounds = -(-9 // max_num_seqs)
    assert least <= num_computed <= least + (num_rounds - 1) * 15


def test_a_step_that_raises_is_repeated_with_its_copies(
    gqa_folder: Path, expected: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = build(gqa_folder)
    execute = core.runner.execute
    steps = 0

    def brittle(plan: SchedulerOutput) -> Any:
        nonlocal steps
        steps += 1
        result = execute(plan)
        if len(plan.scheduled) > 1 and steps % 2:
            raise ZeroDivisionError("after the cache was written")
        return result

    monkeypatch.setattr(core.runner, "execute", brittle)
    assert run(core, requests(4, **SEEDED)) == expected


def test_a_lower_priority_number_goes_first(gqa_folder: Path) -> None:
    core = build(gqa_folder, max_num_seqs=1)
    for name, priority in (("late", 1), ("soon", 0), ("first", -1), ("soon too", 0)):
        core.add_request(replace(Prompt.of(5, 6).request(name, max_tokens=1), priority=priority))
    order = []
    while core.has_work:
        order += [output.request_id for output in core.step()]
    assert order == ["first", "soon", "soon too", "late"]


def test_ending_one_choice_leaves_the_others(gqa_folder: Path) -> None:
    async def main() -> None:
        client = await InlineEngineClient.start(
            EngineArgs(str(gqa_folder), device="cpu", num_threads=1, max_model_len=256, max_num_seqs=2)
        )
        counts: dict[int, int] = defaultdict(int)
        try:
            request = replace(Prompt.of(5, 6, 7).request("r", max_tokens=30, min_tokens=30), n=4)
            async for output in client.generate(request):
                counts[output.index] += len(output.new_token_ids)
                if output.index in (1, 3) and counts[output.index] == 5:
                    client.end_choice("r", output.index)
                    client.end_choice("r", output.index)
            assert counts == {0: 30, 1: 5, 2: 30, 3: 5}
            client.end_choice("r", 0)  # it is over
            async for _ in client.generate(replace(request, n=2)):
                client.end_choice("r", 0)
                client.end_choice("r", 1)
            while client.stats.num_running or client.stats.num_waiting or client.stats.kv_cache_usage:
                await asyncio.sleep(0.01)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("n", [0, 129])
def test_too_many_choices_are_refused(gqa_folder: Path, n: int) -> None:
    with pytest.raises(RequestError, match="n must be"):
        build(gqa_folder).add_request(replace(Prompt.of(5).request("r"), n=n))
