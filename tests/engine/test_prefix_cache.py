"""The prefix cache: what is found again, by whom, what goes first, and that no token of an answer changes.

That nothing wrong is ever found, and everything is that could be, the machine in test_scheduler holds to a model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from engine.answer import SampledToken
from engine.block_manager import BlockManager
from engine.core import EngineCore
from engine.messages import AudioClip, EngineArgs, EngineRequest, FinishReason, SequenceId
from engine.plan import PlanInProgress
from engine.prefix_cache import PrefixCache
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from tests.engine.test_scheduler import (
    POOL,
    FakeRunner,
    add,
    add_choices,
    make_scheduler,
    request,
    run,
    shape,
)
from tests.reference import BUNDLED, Prompt, noise, special_id

CLIP = POOL[-1]
SPEECH = Path(__file__).parents[1] / "fixtures" / "speech"


def make_blocks(num_blocks: int, block_size: int = 2) -> BlockManager:
    return BlockManager(num_blocks, block_size, PrefixCache(block_size))


def roomy(**changes: Any) -> tuple[Scheduler, FakeRunner]:
    scheduler = make_scheduler(caches=True, **{"num_blocks": 64, "max_num_batched_tokens": 64, **changes})
    return scheduler, FakeRunner(scheduler)


def finish(scheduler: Scheduler, runner: FakeRunner) -> None:
    while scheduler.has_work:
        run(scheduler, runner)


def test_a_second_question_about_a_clip_encodes_and_computes_only_what_is_new() -> None:
    scheduler, runner = roomy()
    add(scheduler, request("first", [3, CLIP, 6], max_tokens=1))
    plan, (output,) = run(scheduler, runner)
    assert [new.content_hash for new in plan.clips_to_encode] == [CLIP.content_hash]
    assert output.num_cached_tokens == 0
    scheduler.encoder_cache.drop(CLIP.content_hash)
    add(scheduler, request("second", [3, CLIP, 9], max_tokens=2))
    plan, (output,) = run(scheduler, runner)
    assert shape(plan) == {"second": (20, 3)}
    assert not plan.clips_to_encode
    assert output.num_cached_tokens == 20
    assert run(scheduler, runner)[1][0].num_cached_tokens == 0  # said once
    assert (scheduler.stats.prefix_cache_queries, scheduler.stats.prefix_cache_hits) == (20 + 23, 20)


def test_an_answer_is_found_in_the_next_turn_and_the_last_token_is_always_computed() -> None:
    scheduler, runner = roomy()
    first = add(scheduler, request("turn 1", [6], max_tokens=7))
    finish(scheduler, runner)
    assert first.num_output_tokens == 7
    ids = (*first.token_ids, 5)
    turn = replace(request("turn 2", [1], max_tokens=1), prompt_token_ids=ids)
    add(scheduler, turn)
    assert shape(run(scheduler, runner)[0]) == {"turn 2": (12, 2)}
    add(scheduler, replace(turn, request_id="whole blocks", prompt_token_ids=ids[:12]))
    assert shape(run(scheduler, runner)[0]) == {"whole blocks": (8, 4)}


@pytest.mark.parametrize(
    ("changed", "num_found"),
    [
        ("nothing", 16),
        ("another clip of the same length", 0),
        ("the clip one token later", 0),
        ("another salt", 0),
        ("a token at the end", 12),
        ("a token at the beginning", 0),
    ],
)
def test_what_a_key_covers(changed: str, num_found: int) -> None:
    scheduler, runner = roomy()
    add(scheduler, request("a", [2, CLIP, 6], max_tokens=1, salt="s"))
    finish(scheduler, runner)
    again = request("b", [2, CLIP, 6], max_tokens=1, salt="s")
    ids = again.prompt_token_ids
    (part,) = again.clips
    again = {
        "nothing": again,
        "another clip of the same length": replace(again, clips=(replace(part, content_hash="other"),)),
        "the clip one token later": replace(again, clips=(replace(part, offset=3),)),
        "another salt": replace(again, cache_salt="t"),
        "a token at the end": replace(again, prompt_token_ids=(*ids[:14], 7, *ids[15:])),
        "a token at the beginning": replace(again, prompt_token_ids=(7, *ids[1:])),
    }[changed]
    add(scheduler, again)
    plan = scheduler.schedule()
    assert plan.scheduled[0].start == num_found


@pytest.mark.parametrize("salts", [(None, "a"), ("a", None), ("a", "b")])
def test_salts_share_nothing(salts: tuple[str | None, str | None]) -> None:
    scheduler, runner = roomy()
    for name, salt in zip(("one", "other"), salts, strict=True):
        add(scheduler, request(name, [20], salt=salt, max_tokens=1))
        assert shape(run(scheduler, runner)[0]) == {name: (0, 20)}


def test_equal_prompts_of_one_step_compute_themselves_and_leave_one_copy() -> None:
    scheduler, runner = roomy()
    for name in "ab":
        add(scheduler, request(name, [13], max_tokens=1))
    assert shape(run(scheduler, runner)[0]) == {"a": (0, 13), "b": (0, 13)}
    add(scheduler, request("c", [13], max_tokens=1))
    assert shape(run(scheduler, runner)[0]) == {"c": (12, 1)}


def test_a_sequence_finds_its_own_blocks_after_a_preemption() -> None:
    scheduler, runner = roomy()
    sequence = add(scheduler, request("a", [2, CLIP, 1], max_tokens=9))
    for _ in range(4):
        run(scheduler, runner)
    scheduler._preempt(sequence, PlanInProgress(0, 0))
    plan, (output,) = run(scheduler, runner)
    assert shape(plan) == {"a": (16, 2)}
    assert not plan.clips_to_encode
    assert output.num_cached_tokens == 0


@pytest.mark.parametrize("fault", ["logits", "clip", "abort"])
def test_what_failed_or_was_never_sampled_from_is_not_found(fault: str) -> None:
    scheduler, runner = roomy(max_num_batched_tokens=16)
    add(scheduler, request("a", [8, CLIP, 1]))
    run(scheduler, runner)  # two chunks; a chunk's rows are known to be good when a token comes of them
    plan = scheduler.schedule()
    runner.execute(plan)
    if fault == "logits":
        scheduler.update(plan, {("a", 0): (SampledToken(0, error="not a number"),)})
    elif fault == "clip":
        scheduler.update(plan, {("a", 0): (SampledToken(2),)}, frozenset({CLIP.content_hash}))
        del runner.clips[CLIP.content_hash]
    else:
        scheduler.abort("a")
    scheduler.check_integrity()
    add(scheduler, request("b", [8, CLIP, 1]))
    assert shape(run(scheduler, runner)[0]) == {"b": (0, 16)}


def test_a_fork_that_was_preempted_goes_on_from_its_own_output() -> None:
    scheduler, runner = roomy()
    _, second = add_choices(scheduler, request("a", [10], n=2, max_tokens=9))
    for _ in range(6):
        run(scheduler, runner)
    assert second.num_tokens == 15
    scheduler._preempt(second, PlanInProgress(0, 0))
    plan, _ = run(scheduler, runner)
    assert [(item.start, item.num_tokens, item.block_copy) for item in plan.scheduled][1] == (12, 3, None)


def test_cached_blocks_are_free_blocks() -> None:
    scheduler, runner = roomy(num_blocks=11, max_model_len=40)
    add(scheduler, request("a", [39], max_tokens=1))
    run(scheduler, runner)
    assert scheduler.blocks.usage == 0.0
    add(scheduler, replace(request("b", [39], max_tokens=1), cache_salt="x"))
    assert shape(run(scheduler, runner)[0]) == {"b": (0, 39)}  # takes them all
    add(scheduler, request("c", [39], max_tokens=1))
    assert shape(run(scheduler, runner)[0]) == {"c": (0, 39)}
    assert scheduler.stats.num_preemptions == 0


def test_no_more_than_the_bound_is_kept_and_the_youngest_stays() -> None:
    scheduler, runner = roomy(block_size=2, max_kept=4)
    for name, length in (("old", 7), ("young", 9)):
        add(scheduler, request(name, [length], salt=name, max_tokens=1))
        finish(scheduler, runner)
        scheduler.check_integrity()
    for name, length, found in (("young", 9, 8), ("old", 7, 0)):
        add(scheduler, request(f"{name} again", [length], salt=name, max_tokens=1))
        assert shape(run(scheduler, runner)[0]) == {f"{name} again": (found, length - found)}


def test_off_means_off() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    runner = FakeRunner(scheduler)
    for name in "ab":
        add(scheduler, request(name, [13], max_tokens=1))
        assert shape(run(scheduler, runner)[0]) == {name: (0, 13)}
    assert scheduler.stats.prefix_cache_hits == 0


def compute(blocks: BlockManager, tokens: list[int]) -> Sequence:
    """A sequence that has just computed all that it has."""
    sequence = Sequence(replace(request("r", [1]), prompt_token_ids=tuple(tokens)), seed=0)
    sequence.num_computed_tokens = blocks.reuse(sequence)
    blocks.allocate(sequence, len(tokens))
    sequence.num_computed_tokens = len(tokens)
    blocks.publish(sequence, len(tokens))
    return sequence


def num_found(blocks: BlockManager, tokens: list[int]) -> int:
    return blocks.reuse(Sequence(replace(request("r", [1]), prompt_token_ids=(*tokens, 0)), seed=0))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 16))
def test_the_longest_unused_goes_first_and_tails_before_heads(uses: list[int], num_taken: int) -> None:
    """Against a list that says in which order blocks must go: (conversation, block), the first to go first."""
    blocks = make_blocks(num_blocks=17)
    texts = {key: [10 + key] * 8 for key in range(4)}
    order: list[tuple[int, int]] = []
    for key in uses:
        blocks.free(compute(blocks, texts[key]))
        order = [entry for entry in order if entry[0] != key] + [(key, index) for index in (3, 2, 1, 0)]
        blocks.check_integrity([])
    for _ in range(num_taken):
        blocks.allocate(Sequence(request("taken", [1]), seed=0), 2)
    kept = order[max(0, num_taken - (16 - len(order))) :]
    for key in texts:
        length = sum(1 for entry in kept if entry[0] == key)
        assert num_found(blocks, texts[key]) == 2 * length


def test_a_tail_follows_what_was_found_when_it_can() -> None:
    blocks = make_blocks(num_blocks=40)
    first = compute(blocks, [1] * 8)
    blocks.free(first)
    again = compute(blocks, [1] * 8 + [2] * 8)
    assert again.block_table == list(range(1, 9))


def test_a_run_may_take_old_blocks_but_no_new_ones() -> None:
    blocks = make_blocks(num_blocks=13)
    for key in range(4):
        blocks.free(compute(blocks, [key] * 6))  # blocks 1-3, 4-6, 7-9, 10-12
    assert num_found(blocks, [3] * 6) == 6  # is held from now on
    newcomer = compute(blocks, [9] * 6)
    assert newcomer.block_table == [1, 2, 3]
    assert num_found(blocks, [1] * 6) == num_found(blocks, [2] * 6) == 6


GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
SEEDED: dict[str, Any] = {"temperature": 1.2, "seed": 5, "max_tokens": 24}
START, END = special_id("<|im_start|>"), special_id("<|im_end|>")
BOS, EOS = special_id("<|audio_bos|>"), special_id("<|audio_eos|>")


def load(name: str) -> np.ndarray:
    samples, rate = soundfile.read(SPEECH / name, dtype="float32")
    assert rate == 16000
    return samples


def bundled(**changes: Any) -> EngineCore:
    return EngineCore.build(
        EngineArgs(str(BUNDLED), device="cpu", dtype="float32", num_threads=1, max_model_len=1024, **changes)
    )


def converse(core: EngineCore, salt: str | None = None, **sampling: Any) -> tuple[list[Any], list[int]]:
    """Five turns with two clips, in two conversations side by side. -> all answers, cached tokens of each turn."""
    words = Prompt.of(*range(300, 309)).token_ids
    histories: dict[str, list[Any]] = {
        "a": [START, *words, BOS, load("digits_four_two_seven.wav"), EOS],
        "b": [START, *words, BOS, load("sound_siren.wav"), EOS],
    }
    answers: list[Any] = []
    cached: list[int] = []
    for turn in range(5):
        given: dict[SequenceId, list[int]] = {}
        found: dict[SequenceId, int] = {}
        for name, parts in histories.items():
            parts += [*words[: turn + 2], END, START]
            made = Prompt.of(*parts).request(f"{name}{turn}", stop_token_ids=(END,), **sampling)
            core.add_request(replace(made, n=2, cache_salt=salt))
        while core.has_work:
            for output in core.step():
                assert output.finish_reason is not FinishReason.ERROR, output.error
                given.setdefault(output.sequence_id, []).extend(output.new_token_ids)
                found[output.sequence_id] = found.get(output.sequence_id, 0) + output.num_cached_tokens
            core.scheduler.check_integrity()
        for name, parts in histories.items():
            parts += given[f"{name}{turn}", 0]
        answers.append(given)
        cached.append(sum(found.values()))
        if turn == 2:  # a second clip joins one of them
            histories["a"] += [BOS, load("sum_three_plus_four.wav"), EOS]
    return answers, cached


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_no_token_of_a_conversation_changes(sampling: dict[str, Any]) -> None:
    plain, none_cached = converse(bundled(enable_prefix_caching=False), **sampling)
    assert none_cached == [0] * 5
    core = bundled()
    for salt in (None, "other"):
        answers, cached = converse(core, salt, **sampling)
        assert answers == plain
        assert cached[0] == 0  # a salt finds nothing of another
        assert cached == sorted(cached)
        assert cached[1] > 0
    answers, cached = converse(core, **sampling)
    assert answers == plain
    assert cached[0] > 0
    chunked = bundled(max_num_batched_tokens=33, max_num_seqs=3, max_encoder_frames=3000)
    assert converse(chunked, **sampling)[0] == plain


def test_no_token_changes_where_blocks_are_evicted_all_the_time() -> None:
    plain, _ = converse(bundled(enable_prefix_caching=False), **GREEDY)
    text = bundled().runner.kv_cache[:, :, :1]
    small = bundled(kv_cache_memory_bytes=text.numel() * text.element_size() * 64)
    assert converse(small, **GREEDY)[0] == plain
    assert small.stats.kv_cache_usage == 0.0


def test_encoding_is_skipped_for_a_clip_that_is_covered(gqa_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = EngineCore.build(EngineArgs(str(gqa_folder), device="cpu", num_threads=1, max_model_len=256))
    encoded: list[AudioClip] = []
    encode = core.runner._encode_batch
    monkeypatch.setattr(core.runner, "_encode_batch", lambda clips: (encoded.extend(clips), encode(clips))[1])
    prompt = Prompt.of(5, noise(30_001, seed=3), *range(40, 60))

    def ask(made: EngineRequest) -> list[int]:
        core.add_request(made)
        tokens: list[int] = []
        while core.has_work:
            for output in core.step():
                tokens += output.new_token_ids
        return tokens

    first = ask(prompt.request("a"))
    core.scheduler.encoder_cache.drop(prompt.clips[0].content_hash)
    assert ask(prompt.request("b")) == first
    assert len(encoded) == 1
    other = replace(prompt.clips[0], samples=noise(30_001, seed=4), content_hash="other")
    ask(replace(prompt.request("c"), clips=(other,)))
    assert [part.content_hash for part in encoded[1:]] == ["other"]  # the same ids do not make the same clip
