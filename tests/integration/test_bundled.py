"""A fresh install, used as its README says: spoken words in, the right words out, over HTTP."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from model.config import num_audio_tokens
from tests.integration.conftest import ROOT, ServerProcess, data_url, input_audio, text

SPEECH = ROOT / "tests" / "fixtures" / "speech"
CLIPS: dict[str, dict[str, Any]] = json.loads((SPEECH / "transcripts.json").read_text(encoding="utf-8"))
ASKED = [(name, question) for name, clip in CLIPS.items() for question in clip["answers"]]
DIGITS = "digits_four_two_seven.wav"
SUM = "sum_three_plus_four.wav"
SIREN = "sound_siren.wav"


def clip(name: str) -> dict[str, object]:
    """A fixture as OpenAI's audio part."""
    return input_audio((SPEECH / name).read_bytes())


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    """A user's turn."""
    return {"role": "user", "content": list(parts)}


def ask(server: ServerProcess, *messages: dict[str, Any]) -> str:
    """The answer, whole."""
    answer = server.openai.chat.completions.create(model="tympan-tiny", messages=list(messages))
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content or ""


@pytest.mark.parametrize(("name", "question"), ASKED)
def test_every_fixture_is_understood(name: str, question: str, bundled_server: ServerProcess) -> None:
    parts = [clip(name), text(question)] if question else [clip(name)]
    assert ask(bundled_server, user(*parts)) == CLIPS[name]["answers"][question]


def test_streamed_answer_is_the_whole_answer(bundled_server: ServerProcess) -> None:
    stream = bundled_server.openai.chat.completions.create(
        model="tympan-tiny",
        messages=[user(clip(DIGITS), text("What does the person say?"))],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == "four two seven"
    assert len([piece for piece in pieces if piece]) > 1
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    samples = soundfile.info(SPEECH / DIGITS).frames
    assert usage.prompt_tokens_details.audio_tokens == num_audio_tokens(samples)


def test_voice_chat_needs_no_text(bundled_server: ServerProcess) -> None:
    assert "seven" in ask(bundled_server, user(clip(SUM)))


def test_conversation_over_two_turns(bundled_server: ServerProcess) -> None:
    first = [
        user(clip(DIGITS), text("What does the person say?")),
        {"role": "assistant", "content": "four two seven"},
    ]
    assert "siren" in ask(bundled_server, *first, user(clip(SIREN), text("What's that sound?")))


def test_two_audios_in_one_message_are_both_in_the_prompt(bundled_server: ServerProcess) -> None:
    """Which of two clips is meant, so small a model rarely tells (see its card): what it reads is held here."""
    names = ("digit_six.wav", DIGITS)
    answer = bundled_server.openai.chat.completions.create(
        model="tympan-tiny", messages=[user(*map(clip, names), text("What does the second audio say?"))]
    )
    assert answer.choices[0].message.content == "four two seven"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    counts = [num_audio_tokens(soundfile.info(SPEECH / name).frames) for name in names]
    assert answer.usage.prompt_tokens_details.audio_tokens == sum(counts)


def test_the_second_of_two_audios_is_told_apart(bundled_server: ServerProcess) -> None:
    six, digits = clip("digit_six.wav"), clip(DIGITS)
    assert ask(bundled_server, user(six, digits, text("What does the second audio say?"))) == "four two seven"
    assert ask(bundled_server, user(digits, six, text("What does the second audio say?"))) == "six"
    assert ask(bundled_server, user(digits, six, text("What does the first audio say?"))) == "four two seven"


def test_the_base_models_raw_prompt(bundled_server: ServerProcess) -> None:
    for prompt in ("<|audio_bos|><|AUDIO|><|audio_eos|>", "<|AUDIO|>"):
        answer = bundled_server.openai.completions.create(
            model="tympan-tiny",
            prompt=f"{prompt}Generate the caption in English:",
            extra_body={"audio": [clip(SIREN)]},
        )
        assert "siren" in answer.choices[0].text


def test_the_seeds_batch_is_requests_at_once(bundled_server: ServerProcess) -> None:
    asked = [(name, question) for name, question in ASKED if question]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda item: ask(bundled_server, user(clip(item[0]), text(item[1]))), asked))
    assert answers == [CLIPS[name]["answers"][question] for name, question in asked]


@pytest.mark.parametrize("n", [3, 70])
def test_choices_of_one_question(n: int, bundled_server: ServerProcess) -> None:
    """More than --max-num-seqs has room for at once, too."""
    answer = bundled_server.openai.chat.completions.create(
        model="tympan-tiny", messages=[user(clip(DIGITS), text("What does the person say?"))], n=n, temperature=0
    )
    assert [choice.index for choice in answer.choices] == list(range(n))
    assert {choice.message.content for choice in answer.choices} == {"four two seven"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens % n == 0


def test_a_seeds_first_choice_is_the_answer_without_n(bundled_server: ServerProcess) -> None:
    def texts(**options: Any) -> list[str]:
        answer = bundled_server.openai.completions.create(
            model="tympan-tiny", seed=5, temperature=2.0, top_p=1.0, extra_body={"top_k": 0}, **options
        )
        return [choice.text for choice in answer.choices]

    four = texts(prompt="Once upon", n=4)
    assert len(set(four)) > 1
    assert texts(prompt="Once upon") == four[:1]
    assert texts(prompt=["Once upon", "Once upon"], n=2) == 2 * four[:2]


def test_an_answer_continued(bundled_server: ServerProcess) -> None:
    messages = [user(clip(DIGITS), text("What does the person say?")), {"role": "assistant", "content": "four"}]
    answer = bundled_server.openai.chat.completions.create(
        model="tympan-tiny", messages=messages, temperature=0, extra_body={"continue_final_message": True}
    )
    assert answer.choices[0].message.content == " two seven"


def encode(samples: np.ndarray, container: str, codec: str, rate: int) -> bytes:
    """The clip in another format, by FFmpeg."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="flt", layout="mono")
        frame.sample_rate = 16000
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate)
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("container", "codec", "rate"), [("mp3", "mp3", 44100), ("webm", "libopus", 48000), ("ipod", "aac", 44100)]
)
def test_compressed_recordings_are_understood(
    container: str, codec: str, rate: int, bundled_server: ServerProcess
) -> None:
    samples, _ = soundfile.read(SPEECH / DIGITS, dtype="float32")
    part = {"type": "audio_url", "audio_url": {"url": data_url(encode(samples, container, codec, rate))}}
    assert ask(bundled_server, user(part, text("What does the person say?"))) == "four two seven"
