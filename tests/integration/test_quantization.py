"""Fewer bits change no greedy answer of the bundled checkpoint, alone or in a batch."""

from __future__ import annotations

import pytest

from tests.integration.conftest import text
from tests.integration.test_bundled import ASKED, CLIPS, SPEECH, user
from tympan import LLM


@pytest.mark.parametrize("fewer_bits", [{"quantization": "int8"}, {"kv_cache_dtype": "fp8"}], ids=str)
def test_the_greedy_answers_are_the_same(fewer_bits: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = [
        [user(*[{"type": "audio", "audio": SPEECH / name}, text(question)][: 1 + bool(question)])]
        for name, question in ASKED
    ]
    expected = [CLIPS[name]["answers"][question] for name, question in ASKED]
    with LLM(**fewer_bits) as llm:
        assert [llm.chat([one], progress=False, temperature=0)[0].text for one in asked] == expected
        assert [answer.text for answer in llm.chat(asked, progress=False, temperature=0)] == expected
