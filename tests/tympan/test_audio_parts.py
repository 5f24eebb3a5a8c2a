"""Clips as Python has them: what the server hears of files, bytes and arrays."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tympan import AnswerError
from tympan.audio_parts import audio_part, inline_audio

RATE = 16000
NOISE = np.random.default_rng(0).uniform(-1, 1, 500)


def heard(part: Any) -> tuple[np.ndarray, int]:
    """The samples that the server gets, as written, and their rate."""
    data = base64.b64decode(part["input_audio"]["data"])
    info = soundfile.info(io.BytesIO(data))
    dtype = {"PCM_16": "int16", "PCM_32": "int32", "FLOAT": "float32", "DOUBLE": "float64"}[info.subtype]
    return soundfile.read(io.BytesIO(data), dtype=dtype)


@pytest.mark.parametrize(
    "samples",
    [
        NOISE.astype(np.float32),
        NOISE,
        (NOISE * 32767).astype(np.int16),
        (NOISE * 2**31).astype(np.int32),
        NOISE.astype(np.float32).reshape(250, 2),
        NOISE.astype(">f4"),
    ],
)
def test_arrays_arrive_bit_for_bit(samples: np.ndarray) -> None:
    array, rate = heard(audio_part((samples, 22050), "audio[0]"))
    assert rate == 22050
    np.testing.assert_array_equal(array, samples)


def test_whatever_becomes_an_array_is_one() -> None:
    class Tensor:
        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            return NOISE.astype(np.float32)

    np.testing.assert_array_equal(heard(audio_part((Tensor(), 16000.0), "audio[0]"))[0], NOISE.astype(np.float32))


@pytest.mark.parametrize(
    ("clip", "code", "words"),
    [
        ((np.zeros((2, 3, 4)), RATE), "invalid_value", "(2, 3, 4)"),
        ((np.zeros((2, 16000)), RATE), "invalid_value", "(2, 16000)"),  # channels first: not ours to guess
        ((np.float32(0.5), RATE), "invalid_value", "()"),
        ((np.zeros(9, np.uint8), RATE), "invalid_type", "uint8"),
        ((["a", "b"], RATE), "invalid_type", "U1"),
        ((np.zeros(9), 0), "invalid_value", "sampling rate"),
        ((np.zeros(9), 16000.5), "invalid_value", "sampling rate"),
        ((np.zeros(9), None), "invalid_value", "sampling rate"),
        ((np.zeros(9), float("nan")), "invalid_value", "sampling rate"),
        ((np.zeros(9), 2**40), "invalid_value", "sampling rate"),
        (np.zeros(9), "invalid_type", "pair"),
        (7, "invalid_type", "pair"),
        ("no/such/file.wav", "audio_file_unreadable", "No such file"),
        ("/", "audio_file_unreadable", "directory"),
        ("a\0b", "audio_file_unreadable", "null"),
    ],
)
def test_what_is_no_clip_is_refused(clip: Any, code: str, words: str) -> None:
    with pytest.raises(AnswerError) as caught:
        audio_part(clip, "messages[0].content[1]")
    assert caught.value.code == code
    assert words in caught.value.message
    assert caught.value.param == "messages[0].content[1]"


def test_files_and_bytes_pass_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "clip.bin").write_bytes(b"not looked at")
    for clip in (
        tmp_path / "clip.bin",
        os.fspath(tmp_path / "clip.bin"),
        b"not looked at",
        bytearray(b"not looked at"),
    ):
        part: Any = audio_part(clip, "audio[0]")
        assert base64.b64decode(part["input_audio"]["data"]) == b"not looked at"


@pytest.mark.parametrize("url", ["https://example.com/a.wav", "HTTP://example.com/a", "data:audio/wav;base64,AA=="])
def test_urls_are_left_to_the_server(url: str) -> None:
    assert audio_part(url, "audio[0]") == {"type": "audio_url", "audio_url": {"url": url}}


def test_a_conversation_keeps_its_shape() -> None:
    theirs = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "name": "x",
            "content": [{"type": "audio", "audio": b"abc"}, {"type": "text", "text": "?"}],
        },
    ]
    before = [dict(message) for message in theirs]
    ours = inline_audio(theirs)
    assert theirs == before
    assert ours[0] == theirs[0]
    assert ours[1]["name"] == "x"
    assert [part["type"] for part in ours[1]["content"]] == ["input_audio", "text"]


@pytest.mark.parametrize("key", ["audio", "audio_url"])
def test_the_model_cards_key_may_hold_a_file_too(key: str) -> None:
    ours = inline_audio([{"role": "user", "content": [{"type": "audio", key: b"abc"}]}])
    assert base64.b64decode(ours[0]["content"][0]["input_audio"]["data"]) == b"abc"


@pytest.mark.parametrize(
    "messages", [None, "hi", 3, [None], ["hi"], [{"role": "user"}], [{"content": [None, {"type": "audio"}]}]]
)
def test_what_is_no_conversation_is_left_to_the_api(messages: Any) -> None:
    assert inline_audio(messages) == messages
