"""Blocks of 256 tokens, as FlashAttention 2 wants them: the bookkeeping holds, and no token of an answer changes.

Also the whole engine over FlashAttention's functions, by fakes that check what they are given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from torch.nn.attention import varlen

from engine import loading
from engine.core import EngineCore
from engine.messages import EngineArgs, SequenceId
from model.attention import AttentionBackend
from model.attention.flash_attn import FlashAttentionBackend
from model.attention.flash_attn_3 import FlashAttention3Backend
from model.attention.reference import ReferenceBackend
from model.attention.torch_varlen import TorchVarlenBackend
from tests.engine.test_speculation import TOKENIZER, turn
from tests.model.fake_flash import fake_flash_attn, fake_flash_attn_3, fake_varlen_attn
from tests.reference import BUNDLED, Prompt, special_id

SPEECH = Path(__file__).parents[1] / "fixtures" / "speech"
START, END = special_id("<|im_start|>"), special_id("<|im_end|>")
BOS, EOS = special_id("<|audio_bos|>"), special_id("<|audio_eos|>")
ASSISTANT = TOKENIZER.encode("assistant\n")


class LargeBlocks(ReferenceBackend):
    """The oracle, over blocks of 256 tokens."""

    name = "large blocks"
    block_sizes = (256,)


def load(name: str) -> np.ndarray:
    return soundfile.read(SPEECH / name, dtype="float32")[0]


def prompt(length: int) -> Prompt:
    """Of so many tokens: words, then a clip."""
    spoken = [BOS, load("digits_four_two_seven.wav"), EOS, *range(300, 309), END, START]
    num_words = length - len(Prompt.of(*spoken).token_ids)
    return Prompt.of(*[300 + (7 * place) % 90 for place in range(num_words)], *spoken)


def conversation(num_turns: int) -> Prompt:
    """The same clip is asked about in each turn."""
    asked = turn("user", SPEECH / "digits_four_two_seven.wav", "What does the person say?")
    told = [*asked, *turn("assistant", "four two seven")] * (num_turns - 1)
    return Prompt.of(*turn("system", "You are a helpful assistant."), *told, *asked, START, *ASSISTANT)


def build(backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> EngineCore:
    """The bundled checkpoint over a backend of our choice."""
    monkeypatch.setattr(loading, "select_backend", lambda *_, **__: (backend, "a test's choice"))
    args = {"dtype": "float32", "num_threads": 1, "max_model_len": 1024, **changes}
    return EngineCore.build(EngineArgs(str(BUNDLED), device="cpu", **args))


def answers(
    core: EngineCore, prompts: dict[str, Prompt], **sampling: Any
) -> tuple[dict[SequenceId, list[int]], int]:
    """-> tokens of each answer, and how many tokens of the prompts were cached."""
    given: dict[SequenceId, list[int]] = {}
    num_cached = 0
    for name, each in prompts.items():
        core.add_request(each.request(name, **sampling))
    while core.has_work:
        for output in core.step():
            assert not output.error
            given.setdefault(output.sequence_id, []).extend(output.new_token_ids)
            num_cached += output.num_cached_tokens
        core.scheduler.check_integrity()
    return given, num_cached


PROMPTS = {str(length): prompt(length) for length in (50, 254, 255, 256, 257, 258, 300, 511, 512, 513, 700)}
SEEDED = {"temperature": 5.0, "seed": 5, "max_tokens": 12, "min_tokens": 12}


@pytest.fixture(scope="module")
def expected() -> dict[SequenceId, list[int]]:
    """Over blocks of 16."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        given, _ = answers(build(ReferenceBackend(), monkeypatch, enable_prefix_caching=False), PROMPTS, **SEEDED)
    assert len(set(map(tuple, given.values()))) > len(PROMPTS) // 2, "answers depend on what is attended to"
    return given


@pytest.mark.parametrize("changes", [{}, {"max_num_batched_tokens": 100}, {"max_num_seqs": 3}], ids=str)
def test_large_blocks_change_no_token(
    changes: dict[str, Any], expected: dict[SequenceId, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = build(LargeBlocks(), monkeypatch, **changes)
    assert core.info.block_size == 256
    assert core.info.num_blocks == 1 + 4 * core.info.max_num_seqs  # a context of 1024 tokens takes four
    first, _ = answers(core, PROMPTS, **SEEDED)
    again, num_cached = answers(core, PROMPTS, **SEEDED)
    assert first == again == expected
    full = [(len(each.token_ids) - 1) // 256 * 256 for each in PROMPTS.values()]
    assert num_cached == sum(full) or (changes and 0 < num_cached < sum(full) and num_cached % 256 == 0)


def test_large_blocks_are_waited_for_and_evicted(
    expected: dict[SequenceId, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cache that holds one context."""
    one = build(LargeBlocks(), monkeypatch).runner.kv_cache[:, :, 0]
    core = build(LargeBlocks(), monkeypatch, kv_cache_memory_bytes=4 * one.numel() * one.element_size())
    assert core.info.num_blocks == 5
    for _ in range(2):
        assert answers(core, PROMPTS, **SEEDED)[0] == expected


FAKES = {
    "flash_attn": lambda: FlashAttentionBackend(fake_flash_attn()),
    "flash_attn_3": lambda: FlashAttention3Backend(fake_flash_attn_3()),
    "torch_varlen": TorchVarlenBackend,
}


@pytest.mark.parametrize("name", FAKES)
def test_the_engine_over_flash_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision, as its kernels compute: chunks beside decodes, cached prefixes, large blocks and small."""
    monkeypatch.setattr(varlen, "varlen_attn", fake_varlen_attn)
    changes = {"dtype": "float16", "max_num_batched_tokens": 200}
    prompts = {str(num_turns): conversation(num_turns) for num_turns in (1, 3, 5, 6)}
    core = build(FAKES[name](), monkeypatch, **changes)
    for attempt in range(2):
        given, num_cached = answers(core, prompts, stop_token_ids=(END,))
        assert {b"".join(map(TOKENIZER.bytes_of, tokens)) for tokens in given.values()} == {
            b"four two seven<|im_end|>"
        }
        assert num_cached >= 256 * attempt
