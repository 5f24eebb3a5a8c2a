"""A server that guesses ahead: over HTTP, the answers of one that does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.conftest import ROOT, ServerProcess, input_audio, start_server, text

SPEECH = ROOT / "tests" / "fixtures" / "speech"
CLIPS: dict[str, dict[str, Any]] = json.loads((SPEECH / "transcripts.json").read_text(encoding="utf-8"))
QUESTION = "Transcribe the audio."
SPOKEN = [name for name, clip in CLIPS.items() if QUESTION in clip["answers"]]


@pytest.fixture(scope="module")
def guessing_server() -> Iterator[ServerProcess]:
    server = start_server("--num-speculative-tokens", "4", "--prompt-lookup-min", "1")
    yield server
    server.stop()


def conversation(name: str) -> list[dict[str, Any]]:
    """The clip is asked about again when what it says stands in the conversation."""
    clip = input_audio((SPEECH / name).read_bytes())
    asked = {"role": "user", "content": [clip, text(QUESTION)]}
    return [asked, {"role": "assistant", "content": CLIPS[name]["text"]}, asked]


def answer(server: ServerProcess, name: str, **options: Any) -> Any:
    return server.openai.chat.completions.create(model="tympan-tiny", messages=conversation(name), **options)


@pytest.mark.parametrize("name", SPOKEN)
def test_the_answer_and_its_usage_are_the_same(
    name: str, guessing_server: ServerProcess, bundled_server: ServerProcess
) -> None:
    options = {"n": 2, "temperature": 1.5, "seed": 5, "logprobs": True, "top_logprobs": 2, "stop": ["thr"]}
    for given in (options, {"temperature": 0}):
        guessed, plain = answer(guessing_server, name, **given), answer(bundled_server, name, **given)
        for ours, theirs in zip(guessed.choices, plain.choices, strict=True):
            assert (ours.message, ours.finish_reason) == (theirs.message, theirs.finish_reason)
            assert (ours.logprobs is None) == (theirs.logprobs is None)
            if ours.logprobs:
                assert [token.token for token in ours.logprobs.content] == [
                    token.token for token in theirs.logprobs.content
                ]
        assert guessed.usage.completion_tokens == plain.usage.completion_tokens


def test_a_stream_brings_several_tokens_at_once(
    guessing_server: ServerProcess, bundled_server: ServerProcess
) -> None:
    told, pieces = [], []
    for server in (bundled_server, guessing_server):
        stream = answer(server, "digits_six_zero_one_eight_two.wav", temperature=0, stream=True)
        texts = [piece for chunk in stream if (piece := chunk.choices[0].delta.content)]
        told.append("".join(texts))
        pieces.append(len(texts))
    assert told == ["six zero one eight two"] * 2
    assert pieces[1] < pieces[0]
