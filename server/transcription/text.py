"""The texts of consecutive windows as one text, piece by piece.

White space at the ends of a window's text is dropped; between windows stands one space, or none between
characters of scripts that have no spaces. Pieces put end to end are the whole text. A language tag that opens a
window's text, as base checkpoints write it (`<|en|>`), is taken out and kept.
"""

from __future__ import annotations

import re

_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")
"""Thai, Lao, Burmese, Khmer, Chinese and Japanese."""
_TAG = re.compile(r"<\|([a-z]{2,3})\|>")
_TAG_BEGINNING = re.compile(r"<(\|([a-z]{0,3}(\|)?)?)?")


class TranscriptText:
    """One text in the making."""

    def __init__(self) -> None:
        self.language: str | None = None
        """The first language tag's code."""
        self._last = ""
        """The last character so far."""
        self._held = ""
        """What may turn out to be a tag, or white space at an end."""
        self._has_begun = False
        """This window has text."""

    def begin_window(self) -> None:
        """What comes next belongs to another window."""
        self._held, self._has_begun = "", False

    def push(self, text: str, *, is_last: bool = False) -> str:
        """Take more of this window's text. -> what is certain of it, with the space before it."""
        text = self._held + text
        self._held = ""
        if not self._has_begun:
            text = self._without_tag(text.lstrip())
            if not is_last and _TAG_BEGINNING.fullmatch(text):
                self._held = text
                return ""
        core = text.rstrip()
        self._held = text[len(core) :]
        if not core:
            return ""
        space = "" if self._has_begun or not self._last or self._joins(core[0]) else " "
        self._has_begun, self._last = True, core[-1]
        return space + core

    def _without_tag(self, text: str) -> str:
        if tag := _TAG.match(text):
            self.language = self.language or tag[1]
            return text[tag.end() :].lstrip()
        return text

    def _joins(self, first: str) -> bool:
        return bool(_UNSPACED.match(first) or _UNSPACED.match(self._last))
