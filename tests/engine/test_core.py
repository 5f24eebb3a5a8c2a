"""A step that raises: the culprit ends alone, the others get the tokens they would have had anyway."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core import MAX_FAILED_STEPS, EngineCore
from engine.errors import RequestError
from engine.messages import EngineArgs, FinishReason
from engine.model_runner import StepResult
from engine.plan import SchedulerOutput
from tests.reference import Prompt, noise

POISON = 777


@pytest.fixture
def core(gqa_folder: Path) -> Iterator[EngineCore]:
    """An engine whose runner raises when a step holds the poisoned token."""
    built = EngineCore.build(EngineArgs(str(gqa_folder), device="cpu", max_num_batched_tokens=64))
    execute = built.runner.execute

    def brittle(plan: SchedulerOutput) -> StepResult:
        if any(POISON in item.sequence.token_ids for item in plan.scheduled):
            raise ZeroDivisionError("poison")
        return execute(plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(built.runner, "execute", brittle)
        yield built
    built.scheduler.check_integrity()


def run(core: EngineCore) -> tuple[dict[str, list[int]], dict[str, FinishReason]]:
    """Until nothing is left. -> tokens and endings by request."""
    tokens: dict[str, list[int]] = {}
    endings: dict[str, FinishReason] = {}
    while core.has_work:
        for output in core.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason:
                endings[output.request_id] = output.finish_reason
    return tokens, endings


def test_a_request_that_breaks_the_step_ends_alone(core: EngineCore) -> None:
    honest = {f"h{k}": Prompt.of(3, noise(9000 + 700 * k, k), 4, 5) for k in range(3)}
    for name, prompt in honest.items():
        core.add_request(prompt.request(name, max_tokens=12, repetition_penalty=1.2))
    alone, _ = run(core)
    names = iter(honest)
    core.add_request(honest[first := next(names)].request(first, max_tokens=12, repetition_penalty=1.2))
    core.add_request(Prompt.of(5, POISON, 6).request("poisoned"))
    for name in names:
        core.add_request(honest[name].request(name, max_tokens=12, repetition_penalty=1.2))
    together, endings = run(core)
    assert endings["poisoned"] is FinishReason.ERROR
    assert {name: together[name] for name in honest} == alone


@pytest.mark.parametrize("num_failures", [2, 3])
def test_a_clip_that_found_no_memory_is_encoded_when_it_comes_again(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    """Neither the encoder cache nor the prefix cache may take its placeholders for its sound."""
    encode = core.runner._encode_batch
    failures = iter([True] * num_failures)  # in the step, then for each request alone

    def scarce(clips: Any) -> None:
        if next(failures, False):
            raise torch.OutOfMemoryError("no room for it")
        encode(clips)

    monkeypatch.setattr(core.runner, "_encode_batch", scarce)
    prompt = Prompt.of(3, noise(30_000), 4, 5)
    for name in ("first", "second"):
        core.add_request(prompt.request(name, max_tokens=12))
    tokens, endings = run(core)
    core.add_request(prompt.request("again", max_tokens=12))
    again = run(core)[0]["again"]
    core.scheduler.encoder_cache.clear()
    core.add_request(replace(prompt.request("anew", max_tokens=12), cache_salt="finds nothing"))
    expected = run(core)[0]["anew"]
    assert again == expected
    assert endings["first"] is FinishReason.ERROR
    assert tokens["second"] == (expected if num_failures == 2 else [])


def test_a_device_that_computes_nothing_ends_the_engine(core: EngineCore) -> None:
    for attempt in range(1, MAX_FAILED_STEPS):
        core.add_request(Prompt.of(5, POISON, attempt).request(f"r{attempt}"))
        assert [output.finish_reason for output in core.step()] == [FinishReason.ERROR]
    core.add_request(Prompt.of(5, POISON).request("last"))
    with pytest.raises(ZeroDivisionError):
        core.step()
    core.abort("last")


@pytest.mark.parametrize("sampling", [{"stop_token_ids": (5000,)}, {"logit_bias": ((-1, 1.0),)}])
def test_ids_outside_the_vocabulary_are_refused(core: EngineCore, sampling: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        core.add_request(Prompt.of(1, 2).request("r", **sampling))
