"""The front's benchmark: what it sends is what its figures say."""

from __future__ import annotations

import io

import pytest
import soundfile

from audio import AudioLimits, Pcm
from audio.decode import decode
from benchmarks.front import RATES, make_clip


@pytest.mark.parametrize("kind", RATES)
def test_clips_have_their_length_and_rate(kind: str) -> None:
    file = make_clip(2.0, kind)
    assert soundfile.info(io.BytesIO(file)).samplerate == RATES[kind]
    assert Pcm(decode(io.BytesIO(file), AudioLimits())).num_samples == pytest.approx(32_000, abs=1_600)


def test_no_cache_knows_the_clips_of_the_engines_share() -> None:
    files = [make_clip(2.0, "wav", number) for number in range(32)]
    assert len({Pcm(decode(io.BytesIO(file), AudioLimits())).content_hash for file in files}) == 32
