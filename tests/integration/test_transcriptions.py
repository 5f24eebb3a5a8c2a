"""The bundled checkpoint behind /v1/audio/transcriptions: spoken words in, the right words out."""

from __future__ import annotations

import json

import pytest

from tests.integration.conftest import ROOT, ServerProcess

SPEECH = ROOT / "tests" / "fixtures" / "speech"
SPOKEN = {
    name: entry["text"]
    for name, entry in json.loads((SPEECH / "transcripts.json").read_text(encoding="utf-8")).items()
    if entry["text"]
}


@pytest.mark.parametrize("name", SPOKEN)
def test_every_spoken_fixture(name: str, bundled_server: ServerProcess) -> None:
    with (SPEECH / name).open("rb") as file:
        answer = bundled_server.openai.audio.transcriptions.create(model="tympan-tiny", file=file)
    assert answer.text == SPOKEN[name]


def test_streamed_with_a_language(bundled_server: ServerProcess) -> None:
    with (SPEECH / "digits_four_two_seven.wav").open("rb") as file:
        stream = bundled_server.openai.audio.transcriptions.create(
            model="tympan-tiny", file=file, language="en", stream=True
        )
        *deltas, done = list(stream)
    assert "".join(event.delta for event in deltas) == done.text == "four two seven"
    assert len(deltas) > 1
