"""POST /v1/completions: raw prompts with clips beside them."""

from __future__ import annotations

import pytest

from server.prompt.tokenizer import Tokenizer

from .conftest import Served, audio_part

PATH = "/v1/completions"


@pytest.mark.parametrize("prompt", ["<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:",
                                    "<|AUDIO|>Generate the caption in English:"])  # fmt: skip
def test_caption_prompt(served: Served, tokenizer: Tokenizer, prompt: str) -> None:
    served.say("It is the sound of glass.")
    options = {"extra_body": {"audio": [audio_part(1.0)]}, "max_tokens": 20}
    answer = served.openai.completions.create(model="tiny-audio", prompt=prompt, **options)
    assert answer.choices[0].text.startswith("It is")
    assert answer.usage.prompt_tokens_details.audio_tokens == 25
    request = served.engine.requests[0]
    offset = prompt.startswith("<|audio_bos|>")
    assert request.clips[0].offset == offset
    assert request.prompt_token_ids[offset : offset + 25] == (tokenizer.special["<|AUDIO|>"],) * 25


def test_text_only_and_default_length(served: Served) -> None:
    answer = served.post({"prompt": "Once"}, PATH).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == "Hello there!"
    assert served.engine.requests[0].sampling.max_tokens == 16


def test_ids_as_prompt(served: Served, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Once upon")
    assert served.post({"prompt": ids}, PATH).status_code == 200
    assert served.engine.requests[0].prompt_token_ids == tuple(ids)


def test_audio_shapes(served: Served) -> None:
    data = audio_part(0.5)["input_audio"]["data"]
    url = f"data:audio/wav;base64,{data}"
    audio = [
        {"type": "audio", "audio_url": url},
        {"type": "audio_url", "audio_url": {"url": url}},
        {"input_audio": {"data": data}},
    ]
    assert served.post({"prompt": "<|AUDIO|>a<|AUDIO|>b<|AUDIO|>", "audio": audio}, PATH).status_code == 200
    assert len(served.engine.requests[0].clips) == 3


def test_stream(served: Served) -> None:
    stream = served.openai.completions.create(
        model="tiny-audio", prompt="a", stream=True, stream_options={"include_usage": True}
    )
    *chunks, usage = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello there!"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert usage.usage.completion_tokens == len(served.engine.script.token_ids)


def test_logprobs(served: Served) -> None:
    served.say("Hello there", end=False)
    answer = served.post({"prompt": "a", "logprobs": 2}, PATH).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "Hello there"
    assert logprobs["text_offset"][0] == 0
    assert len(logprobs["top_logprobs"][0]) == 2
    assert len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == len(logprobs["tokens"])


INVALID = {
    "no prompt": ({}, "prompt"),
    "empty prompt": ({"prompt": ""}, "prompt"),
    "mixed prompts": ({"prompt": ["a", [1]]}, "prompt[1]"),
    "an empty prompt among others": ({"prompt": ["a", ""]}, "prompt[1]"),
    "no prompts": ({"prompt": []}, "prompt"),
    "id out of the vocabulary in a list": ({"prompt": [[1], [600]]}, "prompt"),
    "too many choices": ({"prompt": ["a"] * 9, "n": 128}, "n"),
    "nothing to do": ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    "priority": ({"prompt": "a", "priority": "high"}, "priority"),
    "salt": ({"prompt": "a", "cache_salt": ""}, "cache_salt"),
    "id out of the vocabulary": ({"prompt": [600]}, "prompt"),
    "negative id": ({"prompt": [-1]}, "prompt[0]"),
    "audio without a place": ({"prompt": "a", "audio": [audio_part()]}, "audio"),
    "place without audio": ({"prompt": "<|AUDIO|>"}, "audio"),
    "bad audio": ({"prompt": "<|AUDIO|>", "audio": [{"input_audio": {"data": "!"}}]}, "audio[0]"),
    "text as audio": ({"prompt": "a", "audio": [{"type": "text", "text": "a"}]}, "audio[0].type"),
    "logprobs": ({"prompt": "a", "logprobs": 6}, "logprobs"),
    "suffix": ({"prompt": "a", "suffix": "b"}, "suffix"),
    "logprobs of an echo": ({"prompt": "a", "echo": True, "logprobs": 1}, "logprobs"),
    "continue_final_message": ({"prompt": "a", "continue_final_message": True}, "continue_final_message"),
    "best_of": ({"prompt": "a", "best_of": 2}, "best_of"),
    "too long": ({"prompt": "word " * 400}, "prompt"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid(served: Served, name: str) -> None:
    body, param = INVALID[name]
    response = served.post(body, PATH)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert not served.engine.requests
