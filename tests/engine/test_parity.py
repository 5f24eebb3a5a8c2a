"""The whole engine against transformers in float32: the same logits, the same 32 greedy tokens, however run."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.client import EngineClient, InlineEngineClient, ProcessEngineClient
from engine.core import EngineCore
from engine.messages import EngineArgs, EngineRequest, FinishReason
from engine.scheduler import Scheduler
from model.config import Qwen2AudioConfig
from model.kv_cache import bytes_per_block
from tests.reference import Prompt, Reference, noise, special_id

NUM_TOKENS = 32
START, END = special_id("<|im_start|>"), special_id("<|im_end|>")
BOS, EOS = special_id("<|audio_bos|>"), special_id("<|audio_eos|>")
SILENCE = np.zeros(16_000, dtype=np.float32)


def audio(samples: np.ndarray) -> tuple[Any, ...]:
    return BOS, samples, EOS


PROMPTS = {
    "no audio": Prompt.of(START, 5, 6, 7, END, START, 8, 9, 10),
    "0.3 s": Prompt.of(START, 5, *audio(noise(4_800)), 20, 21, END, START),
    "7.3 s": Prompt.of(START, 6, *audio(noise(116_800, seed=1)), 20, 22, END, START),
    "30 s": Prompt.of(START, 7, *audio(noise(480_000, seed=2)), 20, 23, END, START),
    "an odd length": Prompt.of(START, 7, *audio(noise(30_001, seed=3)), 24, END, START),
    "audio alone": Prompt.of(START, *audio(noise(20_000, seed=4)), END, START),
    "audio last": Prompt.of(START, 30, 31, BOS, noise(12_345, seed=5)),
    "two audios in one message": Prompt.of(
        START, *audio(noise(16_000, seed=6)), 40, *audio(noise(30_001, seed=7)), 41, END, START
    ),
    "audio across turns": Prompt.of(
        *(START, 50, *audio(noise(8_000, seed=8)), 51, END, START, 52, 53, 54, END),
        *(START, 55, *audio(noise(8_001, seed=9)), 56, END, START, 57, END, START, *audio(noise(20_000, seed=10))),
        *(END, START),
    ),
    "the same audio twice": Prompt.of(
        START, *audio(noise(16_000, seed=6)), 60, *audio(noise(16_000, seed=6)), 61, END, START
    ),
    "silence": Prompt.of(START, *audio(SILENCE), 70, END, START),
}


@dataclass
class Expected:
    """What transformers says of each prompt."""

    folder: Path
    tokens: dict[str, list[int]]
    logits: dict[str, torch.Tensor]
    """Over the prompt and all but the last greedy token. [T + 31, V]."""


def expect(reference: Reference) -> Expected:
    tokens = {name: reference.greedy(reference.prompt_inputs(prompt)) for name, prompt in PROMPTS.items()}
    logits = {}
    for name, prompt in PROMPTS.items():
        extended = Prompt(prompt.token_ids + tuple(tokens[name][:-1]), prompt.clips)
        logits[name] = reference.logits(reference.prompt_inputs(extended))
    return Expected(reference.folder, tokens, logits)


@pytest.fixture(scope="module")
def gqa(gqa_reference: Reference) -> Expected:
    return expect(gqa_reference)


@pytest.fixture(scope="module")
def mha(mha_reference: Reference) -> Expected:
    return expect(mha_reference)


@pytest.fixture(params=["gqa", "mha"])
def expected(request: pytest.FixtureRequest) -> Expected:
    value: Expected = request.getfixturevalue(request.param)
    return value


def request_of(name: str, **sampling: Any) -> EngineRequest:
    """Greedy, with the end of sequence held back as in the reference."""
    stop = (END, special_id("<|endoftext|>"))
    params = {"max_tokens": NUM_TOKENS, "min_tokens": NUM_TOKENS, "stop_token_ids": stop, **sampling}
    return PROMPTS[name].request(name, **params)


def args_of(folder: Path, **changes: Any) -> EngineArgs:
    return EngineArgs(str(folder), **{"device": "cpu", "num_threads": 1, "max_model_len": 1024, **changes})


def run(core: EngineCore, names: list[str]) -> dict[str, list[int]]:
    """Run the prompts together to their ends, checking the books after each step."""
    tokens: dict[str, list[int]] = {name: [] for name in names}
    for name in names:
        core.add_request(request_of(name))
    while core.has_work:
        for output in core.step():
            assert output.finish_reason in (None, FinishReason.LENGTH), output.error
            tokens[output.request_id] += output.new_token_ids
        core.scheduler.check_integrity()
    return tokens


def record_logits(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every row of logits that the engine samples from, in order."""
    rows: list[torch.Tensor] = []
    compute = core.runner.model.compute_logits

    def recorded(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden)
        rows.extend(logits.clone())
        return logits

    monkeypatch.setattr(core.runner.model, "compute_logits", recorded)
    return rows


def record_prefill(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits at every position that the decoder computes, in order."""
    rows: list[torch.Tensor] = []
    model = core.runner.model
    decode = model.decoder.forward

    def recorded(*arguments: Any) -> torch.Tensor:
        *step, wanted = arguments
        hidden: torch.Tensor = decode(*step)
        rows.extend(model.compute_logits(hidden))
        alone: torch.Tensor = decode(*arguments)
        torch.testing.assert_close(alone, hidden if wanted is None else hidden[wanted], atol=1e-5, rtol=0)
        return alone

    monkeypatch.setattr(model.decoder, "forward", recorded)
    return rows


@pytest.mark.parametrize("name", PROMPTS)
def test_prefill_logits_at_every_position(expected: Expected, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = EngineCore.build(args_of(expected.folder, max_num_batched_tokens=2048))
    rows = record_prefill(core, monkeypatch)
    core.add_request(request_of(name, max_tokens=1, min_tokens=1))
    core.step()
    theirs = expected.logits[name][: len(PROMPTS[name].token_ids)]
    torch.testing.assert_close(torch.stack(rows), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PROMPTS)
def test_alone_32_greedy_tokens_and_their_logits(
    expected: Expected, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = EngineCore.build(args_of(expected.folder))
    rows = record_logits(core, monkeypatch)
    assert run(core, [name])[name] == expected.tokens[name]
    theirs = expected.logits[name][-NUM_TOKENS:]
    torch.testing.assert_close(torch.stack(rows), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 17},
        {"max_num_batched_tokens": 64},
        {"max_num_batched_tokens": 512},
        {"max_num_seqs": 3},
        {"max_encoder_frames": 3000, "encoder_cache_bytes": 0},
        {"max_num_batched_tokens": 23, "encoder_cache_bytes": 0},
    ],
    ids=str,
)
def test_all_together(gqa: Expected, changes: dict[str, Any]) -> None:
    core = EngineCore.build(args_of(gqa.folder, **changes))
    assert run(core, list(PROMPTS)) == gqa.tokens
    assert core.stats.num_preemptions == 0


def test_all_together_in_chunks_without_grouped_heads(mha: Expected) -> None:
    core = EngineCore.build(args_of(mha.folder, max_num_batched_tokens=64))
    assert run(core, list(PROMPTS)) == mha.tokens


def test_all_together_in_another_order(gqa: Expected) -> None:
    core = EngineCore.build(args_of(gqa.folder, max_num_batched_tokens=300))
    assert run(core, list(reversed(PROMPTS))) == gqa.tokens


@pytest.mark.parametrize("changes", [{}, {"async_scheduling": True}, {"num_speculative_tokens": 3}], ids=str)
def test_alone_then_with_another_then_alone_again(
    gqa: Expected, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """One running sequence takes another way through a CPU than two: company that comes and goes changes nothing."""
    core = EngineCore.build(args_of(gqa.folder, **changes))
    sizes: list[int] = []
    launch = core.runner.launch

    def watched(plan: Any, *before: Any) -> Any:
        sizes.extend([len(plan.scheduled)] if plan.scheduled else [])
        return launch(plan, *before)

    monkeypatch.setattr(core.runner, "launch", watched)
    tokens: dict[str, list[int]] = defaultdict(list)
    waiting = {3: "no audio", 5: "0.3 s"}
    core.add_request(request_of("7.3 s"))
    while core.has_work:
        if name := waiting.pop(len(sizes), None):
            core.add_request(request_of(name, max_tokens=5, min_tokens=5))
            if not waiting:
                core.abort("no audio")
        for output in core.step():
            tokens[output.request_id] += output.new_token_ids
    assert tokens["7.3 s"] == gqa.tokens["7.3 s"]
    assert (sizes[0], max(sizes), sizes[-1]) == (1, 2, 1)
    assert tokens["0.3 s"] == gqa.tokens["0.3 s"][:5]


def test_three_choices_of_each(gqa: Expected) -> None:
    core = EngineCore.build(args_of(gqa.folder, max_num_batched_tokens=300, max_num_seqs=16))
    tokens: dict[Any, list[int]] = defaultdict(list)
    for name in PROMPTS:
        core.add_request(replace(request_of(name), n=3))
    while core.has_work:
        for output in core.step():
            tokens[output.sequence_id] += output.new_token_ids
        core.scheduler.check_integrity()
    assert tokens == {(name, index): gqa.tokens[name] for name in PROMPTS for index in range(3)}


@pytest.mark.parametrize("budget", [40, 2048])
def test_after_preemptions(gqa: Expected, budget: int) -> None:
    core = EngineCore.build(args_of(gqa.folder))
    text = core.runner.model.config.text
    small = bytes_per_block(text, 16, torch.float32) * 54  # the 30 s clip takes 52 of them
    changes = {"kv_cache_memory_bytes": small, "max_model_len": 54 * 16, "max_num_batched_tokens": budget}
    core = EngineCore.build(args_of(gqa.folder, **changes))
    assert run(core, list(PROMPTS)) == gqa.tokens
    assert core.stats.num_preemptions > 0


def test_after_every_running_sequence_was_preempted(gqa: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["two audios in one message", "0.3 s", "no audio", "the same audio twice"]
    core = EngineCore.build(args_of(gqa.folder, max_num_batched_tokens=50))
    steps = 0
    schedule = Scheduler.schedule

    def rude(scheduler: Scheduler) -> Any:
        nonlocal steps
        steps += 1
        if steps % 7 == 0:
            for sequence in reversed(scheduler.running.copy()):
                scheduler._preempt(sequence, _NoStep())
        return schedule(scheduler)

    monkeypatch.setattr(Scheduler, "schedule", rude)
    assert run(core, names) == {name: gqa.tokens[name] for name in names}
    assert core.stats.num_preemptions > len(names)


class _NoStep:
    """A step in which nothing is planned yet."""

    scheduled: dict[str, Any] = {}  # noqa: RUF012


def everything(expected: Expected, rng: random.Random) -> dict[str, tuple[EngineRequest, list[int]]]:
    """Request id -> request and its answer: every prompt, some of them with choices, and some twice."""
    made = {name: (replace(request_of(name), n=rng.choice((1, 1, 2))), expected.tokens[name]) for name in PROMPTS}
    for name in rng.sample(list(PROMPTS), 5):
        made[f"{name}, leaves"] = (replace(request_of(name), request_id=f"{name}, leaves"), expected.tokens[name])
    return made


def later_turn(name: str, answer: list[int]) -> tuple[EngineRequest, list[int]]:
    """The prompt with what was answered in the first 20 tokens, and what follows."""
    said, left = tuple(answer[:20]), answer[20:]
    request = request_of(name, max_tokens=len(left), min_tokens=len(left))
    return replace(request, request_id=f"{name}, later", prompt_token_ids=request.prompt_token_ids + said), left


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changes", [{"num_speculative_tokens": 3, "prompt_lookup_min": 1}, {"async_scheduling": True}], ids=str
)
def test_with_everything_on_at_once(expected: Expected, changes: dict[str, Any], seed: int) -> None:
    """Cached prefixes, chunks, a lane for long prompts, too few blocks, choices, clips that have to go, drafts or
    overlap, and requests that leave at any moment: every token of all of them is the reference's."""
    rng = random.Random(seed)
    block_bytes = bytes_per_block(Qwen2AudioConfig.from_folder(expected.folder).text, 16, torch.float32)
    few_blocks = {"kv_cache_memory_bytes": block_bytes * 54, "max_model_len": 54 * 16}
    small_steps = {"max_num_batched_tokens": 40, "long_prefill_token_threshold": 60, "encoder_cache_bytes": 0}
    core = EngineCore.build(args_of(expected.folder, **few_blocks, **small_steps, **changes))
    wanted = everything(expected, rng)
    line = rng.sample(list(wanted), len(wanted))
    running: list[str] = []
    tokens: dict[Any, list[int]] = defaultdict(list)
    num_left = num_reused = 0
    while core.has_work or line:
        if line and rng.random() < 0.8:
            running.append(line.pop())
            core.add_request(wanted[running[-1]][0])
        leavers = [name for name in running if name.endswith("leaves")]
        if leavers and rng.random() < 0.05:
            running.remove(gone := rng.choice(leavers))
            core.abort(gone)
            num_left += 1
            given = tokens.pop((gone, 0), [])
            assert given == wanted.pop(gone)[1][: len(given)]
        for output in core.step():
            assert output.finish_reason in (None, FinishReason.LENGTH), output.error
            tokens[output.sequence_id] += output.new_token_ids
            num_reused += output.num_cached_tokens
            if output.finish_reason and output.index == 0 and (name := output.request_id) in running:
                running.remove(name)
                if name in PROMPTS:
                    wanted[f"{name}, later"] = later_turn(name, expected.tokens[name])
                    line.insert(0, f"{name}, later")
        core.scheduler.check_integrity()
    assert tokens == {(name, index): answer for name, (one, answer) in wanted.items() for index in range(one.n)}
    stats = core.stats
    assert (stats.kv_cache_usage, stats.num_running, stats.num_waiting) == (0.0, 0, 0)
    assert min(num_left, num_reused, stats.num_preemptions) > 0
    assert bool(stats.num_accepted_tokens) == ("num_speculative_tokens" in changes)


async def collect(client: EngineClient, name: str) -> list[int]:
    tokens: list[int] = []
    async for output in client.generate(request_of(name)):
        tokens += output.new_token_ids
    return tokens


@pytest.mark.parametrize("kind", [InlineEngineClient, ProcessEngineClient])
def test_through_a_client(gqa: Expected, kind: Any) -> None:
    async def main() -> dict[str, list[int]]:
        client = await kind.start(args_of(gqa.folder))
        try:
            answers = await asyncio.gather(*(collect(client, name) for name in PROMPTS))
        finally:
            await client.close()
        return dict(zip(PROMPTS, answers, strict=True))

    assert asyncio.run(main()) == gqa.tokens
