"""Token ids to text, as it can be shown: no half characters, no control tokens, nothing past a stop string.

However the ids are split over calls, the joined text is the same. Text that may be the beginning of a stop
string is held back until the next token tells. Of several stop strings the one that is complete first counts.
Knows nothing of requests, usage or finish reasons.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from server.prompt.tokenizer import Tokenizer


class StopMatcher:
    """Finds stop strings in a text that arrives in pieces."""

    def __init__(self, stop_strings: Sequence[str], *, include_match: bool = False) -> None:
        self._stop_strings = stop_strings
        self._include_match = include_match
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found. Nothing may be fed after that."""

    def feed(self, text: str) -> str:
        """Take a piece, give back what may be shown: up to the stop string, or up to what may begin one."""
        assert self.matched is None, "fed past the stop string"
        self._held += text
        found = [
            (start + len(stop), start, stop) for stop in self._stop_strings if (start := self._held.find(stop)) >= 0
        ]
        if found:
            end, start, self.matched = min(found)
            return self._release(end if self._include_match else start, drop_rest=True)
        return self._release(len(self._held) - self._num_uncertain())

    def flush(self) -> str:
        """The text has ended: what was held back began no stop string."""
        return self._release(len(self._held))

    def _release(self, num_chars: int, *, drop_rest: bool = False) -> str:
        shown = self._held[:num_chars]
        self._held = "" if drop_rest else self._held[num_chars:]
        return shown

    def _num_uncertain(self) -> int:
        """Length of the longest tail that is the beginning of a stop string."""
        longest = max(map(len, self._stop_strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop_strings):
                return length
        return 0


class IncrementalDetokenizer:
    """The text of one answer, token by token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        include_stop_string: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stop_strings, include_match=include_stop_string)
        self._tokens_before_stop = min_tokens

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, once it has."""
        return self._matcher.matched

    def push(self, token_id: int) -> str:
        """Add a token, give back the text that can now be shown."""
        token = b"" if token_id in self._skipped else self._tokenizer.bytes_of(token_id)
        text = self._decoder.decode(token)
        if self._tokens_before_stop > 0:  # text before min_tokens can neither hold nor begin a stop string
            self._tokens_before_stop -= 1
            return text
        return self._matcher.feed(text)

    def finish(self) -> str:
        """The answer has ended: what was held back, an unfinished character as U+FFFD."""
        if self.stop_string is not None:
            return ""
        text = self._decoder.decode(b"", final=True)
        shown = self._matcher.feed(text) if text else ""
        return shown if self.stop_string is not None else shown + self._matcher.flush()
