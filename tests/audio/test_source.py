"""Base64 as clients write it, and nothing looser."""

import base64
import io
import json
import os

import pytest

from audio import AudioError, AudioLimits, AudioUrl, FiledText, InlineAudio, TextFile
from audio.source import write_data_url, write_inline

PAYLOAD = bytes(range(251)) + b"\xfb\xff\xfe"  # its base64 uses + and /, and needs padding
TEXT = base64.b64encode(PAYLOAD).decode()
URL_SAFE = base64.urlsafe_b64encode(PAYLOAD).decode()
LIMITS = AudioLimits(max_clip_bytes=1_000)


def filed(text, written=json.dumps):
    """The text as a request's body holds it."""
    file = TextFile()
    file.write(b"others'")
    begin = file.num_bytes
    file.write(written(text).encode()[1:-1])
    stretch = FiledText(file, begin, file.num_bytes)
    file.write(b"others'")
    return stretch


def decode_inline(text, limits, write=write_inline):
    """From memory and from a file alike."""
    outcomes = []
    for source in (text, filed(text)):
        file = io.BytesIO()
        try:
            write(source, file, limits)
            outcomes.append(file.getvalue())
        except AudioError as error:
            outcomes.append((error.code, error.message))
            raised = error
    assert outcomes[0] == outcomes[1]
    if isinstance(outcomes[0], tuple):
        raise raised
    return outcomes[0]


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.rstrip("="),
        URL_SAFE,
        URL_SAFE.rstrip("="),
        "\n".join(TEXT[start : start + 76] for start in range(0, len(TEXT), 76)),
        f"  {TEXT}\r\n",
        TEXT.replace("=", "%3D").replace("+", "%2b").replace("/", "%2F"),
        f"data:audio/wav;base64,{TEXT}",
        f"DATA:Audio/WAV;BASE64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:audio/webm;codecs=opus;base64,{TEXT}",
        f'data:audio/webm; codecs="opus, vp8";base64,{TEXT}',
        f" data:audio/wav;base64,{TEXT.rstrip('=')}",
    ],
)
def test_accepted_spellings(text):
    assert decode_inline(text, LIMITS) == PAYLOAD


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "audio_empty"),
        ("  \n", "audio_empty"),
        ("==", "audio_empty"),
        ("data:audio/wav;base64,", "audio_empty"),
        ("A", "invalid_base64"),
        ("AAAAA", "invalid_base64"),
        ("A===", "invalid_base64"),
        ("===", "invalid_base64"),
        ("AA==AA==", "invalid_base64"),
        ("AAA*", "invalid_base64"),
        ("AAA\x00", "invalid_base64"),
        ("AAA%41", "invalid_base64"),
        ("ÄÄÄÄ", "invalid_base64"),
        ("/etc/passwd.", "invalid_base64"),
        ("https://example.com/a.wav", "invalid_base64"),
        ("data:audio/wav,hello", "invalid_audio_url"),
        ("data:audio/wav;base64", "invalid_audio_url"),
        ("data:", "invalid_audio_url"),
        ("data:audio/wav;base64;x,AAAA", "invalid_audio_url"),
        ("data:" + "a" * 600 + "/b;base64,AAAA", "invalid_audio_url"),
        (base64.b64encode(bytes(1_001)).decode(), "audio_too_large"),
        ("data:audio/wav;base64," + "A" * 100_000, "audio_too_large"),
    ],
)
def test_refused_spellings(text, code):
    with pytest.raises(AudioError) as caught:
        decode_inline(text, LIMITS)
    assert caught.value.code == code


def test_size_limit_counts_the_file_and_not_its_line_breaks():
    full = base64.encodebytes(bytes(1_000)).decode()
    assert len(full) * 3 // 4 > 1_000
    assert decode_inline(full, LIMITS) == bytes(1_000)


def test_data_url_header_of_hostile_length_is_quick_to_refuse():
    with pytest.raises(AudioError, match="malformed"):
        decode_inline("data:" + ";a=" * 1_000_000, LIMITS, write_data_url)


def test_payloads_stay_out_of_logs():
    assert "c2VjcmV0" not in repr(InlineAudio("c2VjcmV0", "wav"))
    assert "token" not in repr(AudioUrl("https://example.com/?token=1"))


@pytest.mark.parametrize("shift", range(4))
def test_escapes_across_the_pieces_of_a_long_text(shift):
    """Long texts are normalised in pieces of a mebibyte."""
    plain = "A" * (2**20 - 4 + shift) + "+/" * 6 + "A" * 2**20 + "+"
    plain += "A" * (-len(plain) % 4)
    escaped = plain.replace("+", "%2B", 3).replace("/", "%2f")
    assert decode_inline(escaped, AudioLimits()) == base64.b64decode(plain)


@pytest.mark.parametrize("escape", [r"\/", r"\u002F", r"\u002f"])
@pytest.mark.parametrize("shift", range(6))
def test_json_escapes_across_the_pieces_of_a_filed_text(escape, shift):
    """PHP and .NET write such JSON."""
    plain = "A" * (2**20 - 8 + shift) + "//" * 6 + "A" * 2**20
    plain += "A" * (-len(plain) % 4)
    file = io.BytesIO()
    write_inline(filed(plain, lambda text: json.dumps(text).replace("/", escape)), file, AudioLimits())
    assert file.getvalue() == base64.b64decode(plain)


@pytest.mark.parametrize("raw", [b"AAAA" * 300_000 + b"\\\\", b"AA\\", b"AA\\u00", b"AA\\x", b"A\nAA", b"\xff\xfe"])
def test_what_json_would_not_take_is_no_base64(raw):
    file = TextFile()
    file.write(raw)
    with pytest.raises(AudioError) as caught:
        write_inline(FiledText(file, 0, len(raw)), io.BytesIO(), AudioLimits())
    assert caught.value.code == "invalid_base64"


def test_a_text_file_is_gone_with_its_last_text():
    before = len(os.listdir("/proc/self/fd"))
    text = filed("AAAA")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert text.quoted() == b'"AAAA"'
    del text
    assert len(os.listdir("/proc/self/fd")) == before
