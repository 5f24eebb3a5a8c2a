"""Speculative decoding in the whole engine: the same answers with drafts and without, in fewer steps."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from engine.answer import SampledToken
from engine.core import EngineCore
from engine.errors import EngineStartError
from engine.messages import EngineArgs, EngineOutput, EngineRequest, FinishReason, SequenceId
from engine.plan import SchedulerOutput
from engine.prompt_lookup import PromptLookup
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from model.kv_cache import bytes_per_block
from server.prompt.tokenizer import Tokenizer
from tests.engine.test_scheduler import STOP, FakeRunner, add, make_scheduler, request, shape
from tests.reference import BUNDLED, Prompt, noise, special_id

SPEECH = Path(__file__).parent.parent / "fixtures" / "speech"
TOKENIZER = Tokenizer.from_folder(BUNDLED)
START, END = special_id("<|im_start|>"), special_id("<|im_end|>")
BOS, EOS = special_id("<|audio_bos|>"), special_id("<|audio_eos|>")


def build(folder: Path, num_drafts: int = 0, **changes: Any) -> EngineCore:
    args = {"device": "cpu", "dtype": "float32", "num_threads": 1, "max_model_len": 1024, "prompt_lookup_min": 1}
    return EngineCore.build(EngineArgs(str(folder), **{**args, "num_speculative_tokens": num_drafts, **changes}))


def run(core: EngineCore, requests: list[EngineRequest]) -> dict[SequenceId, list[EngineOutput]]:
    """To their ends, all together, checking the books after each step."""
    outputs: dict[SequenceId, list[EngineOutput]] = defaultdict(list)
    for wanted in requests:
        core.add_request(wanted)
    while core.has_work:
        for output in core.step():
            assert output.error is None
            assert output.new_token_ids
            outputs[output.sequence_id].append(output)
        core.scheduler.check_integrity()
    return outputs


def told(outputs: dict[SequenceId, list[EngineOutput]]) -> dict[SequenceId, Any]:
    """What a client sees of each answer, however many tokens came at once."""
    return {
        key: (
            [token_id for output in given for token_id in output.new_token_ids],
            [entry.token_id for output in given for entry in output.logprobs],
            given[-1].finish_reason,
            given[-1].stop_token_id,
        )
        for key, given in sorted(outputs.items())
    }


def random_requests() -> list[EngineRequest]:
    """Of every kind, with prompts that repeat themselves: a model of random weights soon does so too."""
    chorus = [*range(40, 52)] * 4
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 2},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 1.2, "seed": 4, "top_k": 20, "logprobs": 0},
        {"temperature": 1.0, "seed": 5, "top_p": 0.8},
        {"repetition_penalty": 1.1},
        {"frequency_penalty": 0.2, "presence_penalty": 0.2, "temperature": 0.8, "seed": 6},
        {"logit_bias": ((41, 4.0), (42, 5.0)), "min_tokens": 5, "stop_token_ids": (42,)},
        {"temperature": 0.7, "seed": 7, "min_tokens": 3, "stop_token_ids": tuple(range(0, 2000, 9))},
        {"temperature": 1.0, "seed": 8, "grammar": "start: /(yes, |no, ){8}/", "stop_token_ids": (END,)},
    ]
    made = []
    for index, kind in enumerate(kinds):
        prompt = Prompt.of(index, *chorus, noise(9_000 + 1_000 * index, seed=index), *chorus, 60 + index)
        made.append(replace(prompt.request(f"r{index}", **{"max_tokens": 48, **kind}), n=1 + index % 3))
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 24},
        {"max_num_seqs": 3, "num_speculative_tokens": 2},
        {"num_speculative_tokens": 9, "prompt_lookup_min": 2, "prompt_lookup_max": 2},
    ],
    ids=str,
)
def test_answers_of_all_kinds_are_the_same_with_drafts(gqa_folder: Path, changes: dict[str, Any]) -> None:
    plain = build(gqa_folder)
    expected = run(plain, random_requests())
    core = build(gqa_folder, 4, **changes)
    outputs = run(core, random_requests())
    assert told(outputs) == told(expected)
    stats = core.stats
    assert sum(map(len, outputs.values())) + stats.num_accepted_tokens == sum(map(len, expected.values()))
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert (plain.stats.num_draft_tokens, plain.stats.num_accepted_tokens) == (0, 0)


def test_answers_are_the_same_after_preemptions(gqa_folder: Path) -> None:
    expected = told(run(build(gqa_folder), random_requests()))
    block_bytes = bytes_per_block(build(gqa_folder).runner.model.config.text, 16, torch.float32)
    core = build(gqa_folder, 5, max_model_len=320, kv_cache_memory_bytes=28 * block_bytes)
    assert told(run(core, random_requests())) == expected
    assert core.stats.num_preemptions > 0
    assert core.stats.num_accepted_tokens > 0


@pytest.mark.parametrize("max_model_len", range(60, 66))
def test_the_context_ends_where_it_did(gqa_folder: Path, max_model_len: int) -> None:
    prompt = Prompt.of(*([*range(40, 52)] * 4))
    requests = [prompt.request("r", max_tokens=1000)]
    expected = told(run(build(gqa_folder, max_model_len=max_model_len), requests))
    assert told(run(build(gqa_folder, 8, max_model_len=max_model_len), requests)) == expected
    (tokens, _, reason, _) = expected["r", 0]
    assert (len(tokens), reason) == (max_model_len - 48, FinishReason.LENGTH)


def turn(role: str, *parts: str | Path) -> list[Any]:
    """A turn of a conversation, as the template writes it."""
    pieces: list[Any] = [START, *TOKENIZER.encode(f"{role}\n")]
    for number, part in enumerate(parts, 1):
        if isinstance(part, Path):
            samples = soundfile.read(part, dtype="float32")[0]
            pieces += [*TOKENIZER.encode(f"Audio {number}: "), BOS, samples, EOS, *TOKENIZER.encode("\n")]
        else:
            pieces += TOKENIZER.encode(part)
    return [*pieces, END, *TOKENIZER.encode("\n")]


def speech_requests() -> list[EngineRequest]:
    """Every clip that can be transcribed, alone and after a turn in which it was."""
    clips = json.loads((SPEECH / "transcripts.json").read_text(encoding="utf-8"))
    question = "Transcribe the audio."
    system = turn("system", "You are a helpful assistant.")
    made = []
    for name, clip in clips.items():
        if question not in clip["answers"]:
            continue
        asked = turn("user", SPEECH / name, question)
        again = [*asked, *turn("assistant", clip["answers"][question]), *asked]
        for kind, turns in (("first", asked), ("again", again)):
            prompt = Prompt.of(*system, *turns, START, *TOKENIZER.encode("assistant\n"))
            made.append(prompt.request(f"{name} {kind}", stop_token_ids=(END,)))
    return made


def test_real_speech_in_one_turn_and_in_two() -> None:
    expected = run(build(BUNDLED), speech_requests())
    core = build(BUNDLED, 4)
    outputs = run(core, speech_requests())
    assert told(outputs) == told(expected)
    assert {given[-1].finish_reason for given in outputs.values()} == {FinishReason.STOP}
    text = b"".join(map(TOKENIZER.bytes_of, told(outputs)["digits_four_two_seven.wav again", 0][0]))
    assert text.decode().startswith("four two seven")
    saved = {
        kind: sum(len(expected[key]) - len(given) for key, given in outputs.items() if key[0].endswith(kind))
        for kind in ("first", "again")
    }
    assert saved["again"] > 5, "what was said in the turn before is there to be guessed"


def test_limits_of_the_lookup_that_cross_are_refused(gqa_folder: Path) -> None:
    with pytest.raises(EngineStartError, match="--prompt-lookup-min 5 is above --prompt-lookup-max 3"):
        build(gqa_folder, 2, prompt_lookup_min=5, prompt_lookup_max=3)


# The scheduler alone


class FixedLookup(PromptLookup):
    """Proposes the same to everybody."""

    def __init__(self, *token_ids: int) -> None:
        super().__init__(1, 1)
        self.token_ids = token_ids

    def propose(self, sequence: Sequence, num_tokens: int) -> tuple[int, ...]:
        return self.token_ids[:num_tokens]


def step(scheduler: Scheduler, runner: FakeRunner, *token_ids: int) -> tuple[SchedulerOutput, list[EngineOutput]]:
    """One step in which every draft comes true, and then all sample `token_ids`."""
    plan = scheduler.schedule()
    runner.execute(plan)
    sampled = {
        item.sequence.sequence_id: tuple(map(SampledToken, (*item.draft_token_ids, *token_ids)))
        for item in plan.scheduled
        if item.samples
    }
    outputs = scheduler.update(plan, sampled)
    scheduler.check_integrity()
    return plan, outputs


def test_drafts_take_what_the_budget_has_left() -> None:
    scheduler = make_scheduler(FixedLookup(2, 3, 4), 3, max_num_batched_tokens=6, num_blocks=64)
    runner = FakeRunner(scheduler)
    for name in ("a", "b"):
        add(scheduler, request(name, [3], max_tokens=20))
    step(scheduler, runner, 2)
    assert shape(step(scheduler, runner, 2)[0]) == {"a": (3, 4), "b": (3, 2)}
    add(scheduler, request("c", [9]))
    plan, _ = step(scheduler, runner, 2)  # a prompt comes before guesses
    assert shape(plan) == {"a": (7, 1), "b": (5, 1), "c": (0, 4)}


@pytest.mark.parametrize(("num_blocks", "num_drafts"), [(5, 1), (20, 4)])
def test_drafts_get_blocks_of_their_own_only_while_memory_is_plenty(num_blocks: int, num_drafts: int) -> None:
    scheduler = make_scheduler(FixedLookup(2, 3, 4, 6), 4, num_blocks=num_blocks, block_size=8, max_model_len=32)
    runner = FakeRunner(scheduler)
    add(scheduler, request("a", [9], max_tokens=20))
    step(scheduler, runner, 2)
    assert shape(step(scheduler, runner, 2)[0]) == {"a": (9, 5)}
    assert shape(step(scheduler, runner, 2)[0]) == {"a": (14, 1 + num_drafts)}


def test_an_answer_ends_inside_accepted_drafts() -> None:
    scheduler = make_scheduler(FixedLookup(2, STOP, 4, 6), 4, num_blocks=64)
    runner = FakeRunner(scheduler)
    add(scheduler, request("stops", [3], max_tokens=20))
    waits = add(scheduler, request("waits", [3], max_tokens=20, min_tokens=4))
    step(scheduler, runner, 2)
    _, (stops, waited) = step(scheduler, runner, STOP)
    assert (stops.new_token_ids, stops.finish_reason, stops.stop_token_id) == ((2, STOP), FinishReason.STOP, STOP)
    assert (waited.new_token_ids, waited.finish_reason) == ((2, STOP, 4, 6, STOP), FinishReason.STOP)
    assert waits.num_computed_tokens == 0
    assert not scheduler.has_work
    assert (scheduler.stats.num_draft_tokens, scheduler.stats.num_accepted_tokens) == (8, 5)


def test_an_answer_is_never_longer_than_asked() -> None:
    scheduler = make_scheduler(FixedLookup(2, 3, 4, 6), 4, num_blocks=64)
    runner = FakeRunner(scheduler)
    add(scheduler, request("a", [3], max_tokens=4))
    step(scheduler, runner, 2)
    plan, (output,) = step(scheduler, runner, 6)
    assert plan.scheduled[0].draft_token_ids == (2, 3)
    assert (output.new_token_ids, output.finish_reason) == ((2, 3, 6), FinishReason.LENGTH)
