"""POST /v1/chat/completions over a real socket, asked by the real OpenAI client."""

from __future__ import annotations

import time

import httpx
import openai
import pytest

from engine.errors import RequestError
from engine.messages import FinishReason
from server.prompt.tokenizer import Tokenizer
from server.requests.parameters import IGNORED, REFUSED_IN_CHAT
from server.requests.schema import ChatRequest

from .conftest import Served, audio_part, text_part, user
from .fake_engine import Script

MODEL = "tiny-audio"


def wait_for_abort(served: Served) -> None:
    deadline = time.monotonic() + 5
    while not served.engine.aborted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.engine.aborted == [request.request_id for request in served.engine.requests]


def test_whole_answer(served: Served) -> None:
    answer = served.openai.chat.completions.create(model=MODEL, messages=[user("Hi")])
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert answer.choices[0].message.content == "Hello there!"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert not served.engine.aborted


def test_usage_counts_audio_and_the_end_token(served: Served) -> None:
    content = [audio_part(1.0), text_part("What does the person say?")]
    answer = served.openai.chat.completions.create(model=MODEL, messages=[user(*content)])
    request = served.engine.requests[0]
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == len(served.engine.script.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.audio_tokens == 25
    assert answer.usage.prompt_tokens_details.cached_tokens == 16


def test_clips_reach_the_engine_at_their_placeholders(served: Served, tokenizer: Tokenizer) -> None:
    messages = [
        user(audio_part(0.5), text_part("first"), audio_part(1.0)),
        {"role": "assistant", "content": "ok"},
        user(audio_part(0.25)),
    ]
    served.openai.chat.completions.create(model=MODEL, messages=messages)
    request = served.engine.requests[0]
    audio_id = tokenizer.special["<|AUDIO|>"]
    assert [clip.num_tokens for clip in request.clips] == [12, 25, 6]
    assert [len(clip.samples) for clip in request.clips] == [8000, 16000, 4000]
    for clip in request.clips:
        assert set(request.prompt_token_ids[clip.offset : clip.offset + clip.num_tokens]) == {audio_id}
        assert request.prompt_token_ids[clip.offset - 1] == tokenizer.special["<|audio_bos|>"]
    assert request.prompt_token_ids.count(audio_id) == 43


@pytest.mark.parametrize("wrap", [lambda url: {"type": "audio_url", "audio_url": {"url": url}},
                                  lambda url: {"type": "audio", "audio_url": url},
                                  lambda url: {"audio_url": {"url": url}}])  # fmt: skip
def test_data_urls(served: Served, wrap) -> None:
    url = "data:audio/wav;base64," + audio_part(0.5)["input_audio"]["data"]
    assert served.post({"messages": [user(wrap(url))]}).status_code == 200
    assert len(served.engine.requests[0].clips) == 1


def test_wrong_declared_format_works(served: Served) -> None:
    part = audio_part(0.5)
    part["input_audio"]["format"] = "mp3"
    assert served.post({"messages": [user(part)]}).status_code == 200


def test_sampling_defaults_come_from_the_checkpoint(served: Served, tokenizer: Tokenizer) -> None:
    served.post({"messages": [user("Hi")]})
    sampling = served.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (0.7, 20, 0.5, 1.1)
    assert set(sampling.stop_token_ids) == {tokenizer.special["<|im_end|>"], tokenizer.special["<|endoftext|>"]}
    assert sampling.max_tokens == 256 - len(served.engine.requests[0].prompt_token_ids)


def test_parameters_reach_the_engine(served: Served) -> None:
    body = {
        "messages": [user("Hi")],
        "temperature": 0,
        "top_p": 0.25,
        "top_k": -1,
        "min_p": 0.1,
        "seed": -5,
        "max_tokens": 3,
        "max_completion_tokens": 7,
        "min_tokens": 2,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.0,
        "logit_bias": {"5": -100, "7": 3.5},
        "ignore_eos": True,
        "stop_token_ids": [9],
        "logprobs": True,
        "top_logprobs": 2,
        "user": "ignored",
        "no_such_field": {"is": "ignored"},
        "tools": None,
        "response_format": {"type": "text"},
        "n": 1,
    }
    assert served.post(body).status_code == 200
    sampling = served.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.25, 0, 0.1)
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (-5, 7, 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 1.5)
    assert sampling.logit_bias == ((5, -100), (7, 3.5))
    assert sampling.stop_token_ids == (9,)
    assert sampling.logprobs == 2


def test_null_equals_omitted(served: Served) -> None:
    fields = {*ChatRequest.model_fields, *REFUSED_IN_CHAT, *IGNORED} - {"messages"}
    body = {"messages": [user("Hi") | {"name": None, "tool_calls": None}], **dict.fromkeys(fields)}
    assert served.post(body).status_code == 200
    assert served.post({"messages": [user("Hi")]}).status_code == 200
    with_nulls, without = served.engine.requests
    assert with_nulls.sampling == without.sampling


def test_harmless_values_of_refused_fields_pass(served: Served) -> None:
    for name, refusal in REFUSED_IN_CHAT.items():
        for value in refusal.harmless:
            assert served.post({"messages": [user("Hi")], name: value}).status_code == 200, name


def test_every_refused_field_is_refused_by_name(served: Served) -> None:
    for name in REFUSED_IN_CHAT:
        response = served.post({"messages": [user("Hi")], name: {"any": "thing"}})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name
    assert not REFUSED_IN_CHAT.keys() & ChatRequest.model_fields.keys()
    assert not REFUSED_IN_CHAT.keys() & IGNORED


def test_length_and_clamping(served: Served) -> None:
    served.say("one two three four", end=False)
    answer = served.post({"messages": [user("Hi")], "max_tokens": 2}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2
    served.post({"messages": [user("Hi")], "max_tokens": 10**6})
    request = served.engine.requests[1]
    assert request.sampling.max_tokens == 256 - len(request.prompt_token_ids)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("keep", "expected"), [(False, "one tw"), (True, "one two th")])
def test_stop_string_ends_and_aborts(served: Served, stream: bool, keep: bool, expected: str) -> None:
    served.say("one two three four", end=False, delay_s=0.001)
    options = {"stop": ["nowhere", "o th"], "extra_body": {"include_stop_str_in_output": keep}}
    create = served.openai.chat.completions.create
    if stream:
        chunks = list(create(model=MODEL, messages=[user("Hi")], stream=True, **options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = create(model=MODEL, messages=[user("Hi")], **options).choices[0]
        text, reason = choice.message.content, choice.finish_reason
        assert choice.stop_reason == "o th"
    assert (text, reason) == (expected, "stop")
    wait_for_abort(served)


def test_logprobs_have_raw_bytes(served: Served, tokenizer: Tokenizer) -> None:
    served.say("é🎈", end=False)
    options = {"logprobs": True, "top_logprobs": 2}
    answer = served.openai.chat.completions.create(model=MODEL, messages=[user("Hi")], **options)
    content = answer.choices[0].logprobs.content
    assert bytes(byte for token in content for byte in token.bytes).decode() == "é🎈"
    assert len(content) == len(served.engine.script.token_ids)
    assert content[0].top_logprobs[0].logprob == -0.5
    assert content[0].top_logprobs[1].logprob == -9999.0


def test_early_failure_keeps_its_status(served: Served) -> None:
    for stream in (False, True):
        served.say("Hi", failure=RequestError("NaN logits"))
        response = served.post({"messages": [user("Hi")], "stream": stream})
        assert response.status_code == 500
        assert response.json()["error"] == {
            "message": "NaN logits", "type": "server_error", "param": None, "code": None
        }  # fmt: skip


def test_failure_inside_a_stream_is_an_event(served: Served) -> None:
    served.say("one two three", failure=RequestError("NaN logits"), fail_after=2)
    with pytest.raises(openai.APIError, match="NaN logits"):
        list(served.openai.chat.completions.create(model=MODEL, messages=[user("Hi")], stream=True))
    served.say("one two three", failure=RequestError("NaN logits"), fail_after=2)
    text = served.post({"messages": [user("Hi")], "stream": True}).text
    assert text.endswith('"code":null}}\n\ndata: [DONE]\n\n')


def test_client_that_gives_up_aborts(served: Served) -> None:
    served.say("one two three four five six", delay_s=0.3)
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{served.url}/v1/chat/completions", json={"messages": [user("Hi")]}, timeout=0.5)
    wait_for_abort(served)


def test_client_that_leaves_a_stream_aborts(served: Served) -> None:
    served.say("one two three four five six", delay_s=0.1)
    stream = served.openai.chat.completions.create(model=MODEL, messages=[user("Hi")], stream=True)
    next(iter(stream))
    stream.close()
    wait_for_abort(served)


def test_finish_reason_of_an_unknown_end(served: Served) -> None:
    served.engine.script = Script([65, 66], FinishReason.LENGTH)
    assert served.post({"messages": [user("Hi")]}).json()["choices"][0]["finish_reason"] == "length"
