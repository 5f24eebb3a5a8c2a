"""Texts of windows as one text: spaces, scripts without them, language tags."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.transcription.text import TranscriptText


def joined(*windows: list[str]) -> tuple[str, str | None]:
    text = TranscriptText()
    pieces = []
    for window in windows:
        text.begin_window()
        pieces += [text.push(delta) for delta in window] + [text.push("", is_last=True)]
    return "".join(pieces), text.language


@pytest.mark.parametrize(("windows", "expected"), [
    ([["one"], ["two"]], ("one two", None)),
    ([[" one ", "\n"], ["", " two\n"], [], [" "], ["three"]], ("one two three", None)),
    ([["a ", " b"]], ("a  b", None)),
    ([["你好。"], ["再见"]], ("你好。再见", None)),
    ([["สวัสดี"], ["ครับ"]], ("สวัสดีครับ", None)),
    ([["안녕"], ["네"]], ("안녕 네", None)),
    ([["<|en", "|>Hello"], ["<|en|>", " there"]], ("Hello there", "en")),
    ([["<", "3"], ["a <|en|> b"]], ("<3 a <|en|> b", None)),
    ([["<|e"]], ("<|e", None)),
])  # fmt: skip
def test_joining(windows: list[list[str]], expected: tuple[str, str | None]) -> None:
    assert joined(*windows) == expected


@given(st.lists(st.text(alphabet="ab <|en>\n", max_size=12), max_size=4), st.data())
def test_pieces_do_not_depend_on_how_deltas_fall(windows: list[str], data: st.DataObject) -> None:
    cut = []
    for window in windows:
        points = sorted(data.draw(st.lists(st.integers(0, len(window)), max_size=3)))
        cut.append([window[start:end] for start, end in zip([0, *points], [*points, len(window)], strict=True)])
    assert joined(*cut) == joined(*([window] for window in windows))
