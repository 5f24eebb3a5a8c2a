"""`LLM` round the fake engine: order, errors, interruption, and that its parameters are the API's."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from engine.messages import EngineOutput, EngineRequest
from tests.server.fake_engine import FakeEngineClient, Script
from tympan import LLM, AnswerError
from tympan.session import AHEAD

from .conftest import MakeLLM

TONE = (0.1 * np.sin(np.arange(8000) / 10).astype(np.float32), 16000)


def ask(text: str, *clips: Any) -> list[dict[str, Any]]:
    parts = [{"type": "audio", "audio": clip} for clip in clips]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


class SlowFirst(FakeEngineClient):
    """Answers later requests sooner, with the length of the prompt as the number of tokens; counts what is open."""

    num_open = 0
    most_open = 0

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await asyncio.sleep(0.05 / (1 + len(self.requests)))
            async for output in super().generate(request):
                yield output
        finally:
            self.num_open -= 1


def test_one_conversation_gives_one_answer(make_llm: MakeLLM) -> None:
    llm, engine = make_llm()
    answer = llm.chat(ask("Hi", TONE), seed=7)
    assert answer.text == "Hello there!"
    assert answer.texts == ["Hello there!"]
    assert answer.finish_reason == "stop"
    assert answer.error is None
    assert answer.body["object"] == "chat.completion"
    (request,) = engine.requests
    assert request.sampling.seed == 7
    np.testing.assert_array_equal(request.clips[0].samples, TONE[0])
    assert answer.usage["prompt_tokens_details"]["audio_tokens"] == request.clips[0].num_tokens


def test_answers_come_in_the_order_of_the_items_and_so_many_at_once(make_llm: MakeLLM) -> None:
    engine = SlowFirst(Script([5, 6, 7]))
    llm, _ = make_llm(engine, max_num_seqs=4)
    answers = llm.chat([ask("x" * length) for length in range(60)], progress=False)
    lengths = [answer.usage["prompt_tokens"] for answer in answers]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]
    assert 4 <= engine.most_open <= 4 + AHEAD


def test_no_items_give_no_answers(make_llm: MakeLLM) -> None:
    llm, _ = make_llm()
    assert llm.chat([]) == []
    assert llm.generate([]) == []


def test_a_list_shows_progress_and_one_item_does_not(make_llm: MakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm, _ = make_llm()
    llm.chat(ask("Hi"))
    llm.chat([ask("Hi")], progress=False)
    assert capsys.readouterr().err == ""
    llm.chat([ask("Hi", TONE)] * 3)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "audio" in shown
    assert "s/s" in shown


def test_prompts_are_taken_raw(make_llm: MakeLLM) -> None:
    llm, engine = make_llm()
    one = llm.generate("<|AUDIO|>Hi", audio=TONE, max_tokens=3)
    assert one.body["object"] == "text_completion"
    assert one.finish_reason == "length"
    assert "Hello there!".startswith(one.text)
    (first,) = engine.requests
    assert first.sampling.max_tokens == 3
    assert len(first.clips) == 1
    many = llm.generate(["Hi", "<|AUDIO|>", [5, 6]], audio=[None, [TONE], None], progress=False)
    assert len(many) == 3
    assert sorted(len(request.clips) for request in engine.requests[1:]) == [0, 0, 1]
    assert (5, 6) in [request.prompt_token_ids for request in engine.requests[1:]]
    assert llm.generate([5, 6]).text == "Hello there!"
    with pytest.raises(ValueError, match="audio for 1"):
        llm.generate(["a", "b"], audio=[TONE])


def test_the_first_failure_is_raised_and_names_its_item(make_llm: MakeLLM) -> None:
    llm, _ = make_llm()
    with pytest.raises(AnswerError, match=r"no/such\.wav") as caught:
        llm.chat([ask("Hi"), ask("Hi", TONE, "no/such.wav")], progress=False)
    assert (caught.value.index, caught.value.param) == (1, "messages[0].content[1]")
    assert caught.value.code == "audio_file_unreadable"
    assert str(caught.value).startswith("item 1, messages[0].content[1]: ")
    assert llm.chat(ask("Hi")).text == "Hello there!"


def test_failures_can_be_returned_in_their_places(make_llm: MakeLLM) -> None:
    llm, _ = make_llm()
    silence = (np.zeros(16, np.float32), 16000)
    items: list[Any] = [ask("Hi"), ask("Hi", silence), "no conversation", ask("Hi", b"no audio"), [], ask("Hi")]
    answers = llm.chat(items, errors="return", progress=False)
    assert [answer.error and answer.error.code for answer in answers] == [
        None,
        "audio_too_short",
        "invalid_type",
        "unsupported_audio",
        "empty_array",
        None,
    ]
    assert [answer.error.index for answer in answers if answer.error] == [1, 2, 3, 4]
    assert answers[5].text == "Hello there!"
    for read in ("text", "usage", "finish_reason", "choices"):
        with pytest.raises(AnswerError, match="too short"):
            getattr(answers[1], read)


@pytest.mark.parametrize(
    ("parameters", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "integer_above_max_value"),
        ({"temperature": float("nan")}, "temperature", "invalid_value"),
        ({"top_k": "5"}, "top_k", "invalid_type"),
        ({"stop": [""]}, "stop[0]", "empty_string"),
        ({"model": "gpt-5"}, "model", "model_not_found"),
        ({"documents": ["x"]}, "documents", "unsupported_parameter"),
        ({"seed": object()}, None, "invalid_type"),
    ],
)
def test_values_are_judged_as_over_http(
    parameters: dict[str, Any], param: str | None, code: str, make_llm: MakeLLM
) -> None:
    llm, engine = make_llm()
    with pytest.raises(AnswerError) as caught:
        llm.chat(ask("Hi"), **parameters)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert not engine.requests


@pytest.mark.parametrize("name", ["temprature", "stream", "stream_options", "messages", "prompt"])
def test_a_parameter_that_does_not_exist_is_a_slip(name: str, make_llm: MakeLLM) -> None:
    llm, _ = make_llm()
    with pytest.raises(TypeError, match=name):
        llm.chat(ask("Hi"), **{name: 1})


def test_parameters_without_effect_pass(make_llm: MakeLLM) -> None:
    llm, _ = make_llm()
    assert llm.chat(ask("Hi"), user="me", tools=None).text == "Hello there!"


def test_an_engine_that_fails_is_told_as_over_http(make_llm: MakeLLM) -> None:
    llm, engine = make_llm()
    engine.dead.set()
    with pytest.raises(AnswerError) as caught:
        llm.chat(ask("Hi"))
    assert (caught.value.status, caught.value.code) == (503, "engine_unavailable")


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"max_model_length": 5}, TypeError, "max_model_length"),
        ({"port": 8000}, TypeError, "port"),
        ({"api_key": ("k",)}, TypeError, "api_key"),
        ({"max_num_seqs": 0}, ValidationError, "max_num_seqs"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LLM(**settings)


def test_it_works_where_a_loop_runs_already(make_llm: MakeLLM) -> None:
    llm, _ = make_llm()

    async def cell() -> str:
        return llm.chat(ask("Hi")).text

    assert asyncio.run(cell()) == "Hello there!"


def test_ctrl_c_aborts_what_runs_and_leaves_the_engine_usable(make_llm: MakeLLM) -> None:
    engine = FakeEngineClient(Script([5] * 1000, delay_s=0.1))
    llm, _ = make_llm(engine)

    def interrupt_once_all_run() -> None:
        while len(engine.requests) < 5:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_once_all_run, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        llm.chat([ask("Hi")] * 5, progress=False)
    assert time.monotonic() - started < 60, "the answers would take 100 s"
    assert len(engine.aborted) == len(engine.requests) == 5
    engine.script = Script([5])
    assert llm.chat(ask("Hi")).finish_reason == "stop"


def test_a_closed_one_says_so(make_llm: MakeLLM) -> None:
    llm, _ = make_llm()
    with llm as same:
        assert same is llm
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.chat(ask("Hi"))


def test_one_that_is_forgotten_is_closed(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()

    class Engine(FakeEngineClient):
        async def close(self) -> None:
            closed.set()

    make_llm(Engine())  # arranges for the engine; its own LLM is kept till the end
    closed.clear()
    llm: LLM | None = LLM()
    assert llm is not None
    del llm
    gc.collect()
    assert closed.wait(5)
