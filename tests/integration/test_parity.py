"""The whole way, over HTTP: what transformers answers to a conversation is what the server answers.

Each case goes to both. Prompt lengths must be equal, 32 greedy tokens must be equal byte for byte, and their
log-probabilities to 1e-3. (Ids beyond the tokenizer have no bytes; their log-probabilities tell them apart.)
"""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import librosa
import numpy as np
import pytest
import torch

from server.prompt.tokenizer import Tokenizer
from tests.integration.conftest import ServerProcess, data_url, input_audio, text, wav
from tests.reference import Reference, Samples, noise

NUM_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """A conversation with AUDIO parts, as (role, parts); clips are float samples, or bytes of a file."""

    turns: list[tuple[str, list[str | Samples | bytes]]]


def stereo_44k() -> bytes:
    """Two different channels at 44.1 kHz."""
    left, right = noise(44100 * 3, 5), noise(44100 * 3, 6)
    return wav(np.stack([left, right], axis=1), 44100)


CASES: dict[str, Callable[[], Case]] = {
    "no audio": lambda: Case([("user", ["What can you do?"])]),
    "0.3 s": lambda: Case([("user", [noise(4800), "What does the person say?"])]),
    "7.3 s": lambda: Case([("user", [noise(116_800, 1), "Transcribe the audio."])]),
    "30 s": lambda: Case([("user", [noise(480_000, 2), "Transcribe the audio."])]),
    "audio only": lambda: Case([("user", [noise(30_000, 3)])]),
    "text before audio": lambda: Case([("user", ["Listen:", noise(30_000, 3)])]),
    "two audios": lambda: Case([("user", [noise(16_000, 3), noise(24_001, 4), "What does the second audio say?"])]),
    "system prompt": lambda: Case([("system", ["Be brief."]), ("user", [noise(16_000, 3), "Well?"])]),
    "across turns": lambda: Case(
        [
            ("user", [noise(20_000, 7), "What's that sound?"]),
            ("assistant", ["It is a bell."]),
            ("user", ["And what can you do when you hear that?"]),
            ("assistant", ["Open the door."]),
            ("user", [noise(40_007, 8), "What does the person say?"]),
        ]
    ),
    "silence": lambda: Case([("user", [np.zeros(32_000, np.float32), "What's that sound?"])]),
    "44.1 kHz stereo": lambda: Case([("user", [stereo_44k(), "What does the person say?"])]),
}


def expected(reference: Reference, case: Case) -> tuple[int, list[int], list[float]]:
    """transformers' prompt length, greedy ids and their log-probabilities."""
    conversation: list[dict[str, Any]] = []
    clips = []
    for role, parts in case.turns:
        content: list[dict[str, str]] = []
        for part in parts:
            if isinstance(part, str):
                content.append(text(part))
                continue
            clips.append(librosa.load(io.BytesIO(part), sr=16000)[0] if isinstance(part, bytes) else part)
            content.append({"type": "audio", "audio_url": "x"})
        conversation.append({"role": role, "content": content if role == "user" else parts[0]})
    inputs = reference.inputs(conversation, clips)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        out = reference.model.generate(
            **inputs, do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    ids = out.sequences[0, num_prompt_tokens:]
    logprobs = torch.cat(out.logits).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return num_prompt_tokens, ids.tolist(), logprobs.tolist()


def messages(case: Case) -> list[dict[str, Any]]:
    """The case as a client sends it; the three spellings of an audio part take turns."""
    spellings = (
        input_audio,
        lambda data: {"type": "audio_url", "audio_url": {"url": data_url(data)}},
        lambda data: {"type": "audio", "audio_url": data_url(data)},
    )
    sent, count = [], 0
    for role, parts in case.turns:
        content: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                content.append(text(part))
            else:
                content.append(spellings[count % 3](part if isinstance(part, bytes) else wav(part)))
                count += 1
        sent.append({"role": role, "content": content if role == "user" else parts[0]})
    return sent


def ask(server: ServerProcess, case: Case) -> dict[str, Any]:
    """The server's answer."""
    body = {"messages": messages(case), "temperature": 0, "logprobs": True, "skip_special_tokens": False}
    response = server.http.post(
        "/v1/chat/completions", json={**body, "max_tokens": NUM_TOKENS, "min_tokens": NUM_TOKENS}
    )
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def check(server: ServerProcess, reference: Reference, case: Case, answer: dict[str, Any]) -> None:
    """Compare an answer with transformers'."""
    num_prompt_tokens, ids, logprobs = expected(reference, case)
    tokenizer = Tokenizer.from_folder(reference.folder)
    assert answer["usage"]["prompt_tokens"] == num_prompt_tokens
    content = answer["choices"][0]["logprobs"]["content"]
    assert [bytes(token["bytes"]) for token in content] == [tokenizer.bytes_of(token_id) for token_id in ids]
    assert [token["logprob"] for token in content] == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_same_answer_as_transformers(name: str, reference_server: ServerProcess, gqa_reference: Reference) -> None:
    case = CASES[name]()
    check(reference_server, gqa_reference, case, ask(reference_server, case))


def test_same_answers_when_all_are_asked_at_once(reference_server: ServerProcess, gqa_reference: Reference) -> None:
    cases = [make() for make in CASES.values()]
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(lambda case: ask(reference_server, case), cases))
    for case, answer in zip(cases, answers, strict=True):
        check(reference_server, gqa_reference, case, answer)


@pytest.mark.parametrize(
    "prompt", ["<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:", "<|AUDIO|>So:"]
)
def test_raw_prompts_of_the_base_model(
    prompt: str, reference_server: ServerProcess, gqa_reference: Reference
) -> None:
    clip = noise(50_000, 9)
    inputs = gqa_reference.raw_inputs(prompt, [clip])
    ids = gqa_reference.greedy(inputs, NUM_TOKENS)
    tokenizer = Tokenizer.from_folder(gqa_reference.folder)
    answer = reference_server.openai.completions.create(
        model="random", prompt=prompt, max_tokens=NUM_TOKENS, temperature=0,
        extra_body={"audio": [input_audio(wav(clip))], "min_tokens": NUM_TOKENS},
    )  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
    special = set(tokenizer.special.values())
    shown = b"".join(tokenizer.bytes_of(token_id) for token_id in ids if token_id not in special)
    assert answer.choices[0].text == shown.decode(errors="replace")
