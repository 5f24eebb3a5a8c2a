"""int8 weights for small batches change no greedy answer of the bundled checkpoint, alone or in a batch."""

from __future__ import annotations

import pytest

from tests.integration.conftest import text
from tests.integration.test_bundled import ASKED, CLIPS, SPEECH, user
from tympan import LLM


def test_int8_gives_the_same_greedy_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = [
        [user(*[{"type": "audio", "audio": SPEECH / name}, text(question)][: 1 + bool(question)])]
        for name, question in ASKED
    ]
    expected = [CLIPS[name]["answers"][question] for name, question in ASKED]
    with LLM(quantization="int8") as llm:
        assert [llm.chat([one], progress=False, temperature=0)[0].text for one in asked] == expected
        assert [answer.text for answer in llm.chat(asked, progress=False, temperature=0)] == expected
