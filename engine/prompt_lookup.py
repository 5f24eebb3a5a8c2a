"""Drafts without a model (prompt lookup, Saxena 2023): what followed when the text last went like this. Torch-free.

The last tokens of a sequence are looked for in its own earlier tokens, prompt and output alike. Of the places where
the last `min_ngram` tokens stand, that one counts which agrees with the most tokens, at most `max_ngram`; of equal
ones the newest. What followed there is the draft; where the text ends before the draft is long enough, it goes on
with the draft itself, as a text that repeats would. A placeholder of audio equals nothing, not even another one, and
is never proposed.

The index is a hash chain as in LZ77 compressors: each place knows the one before it that ends with the same
`min_ngram` tokens. A step adds its new tokens and walks the chain for `MAX_CANDIDATES` places, so its cost does not
grow with the text. Knows nothing of budgets or of what becomes of drafts.
"""

from __future__ import annotations

from itertools import takewhile

from engine.messages import SequenceId
from engine.sequence import Sequence

MAX_CANDIDATES = 32
"""Places looked at: in a text full of one short pattern they would be as many as its tokens."""


class PromptLookup:
    """Keeps an index for each sequence that asked for drafts, until `release`."""

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        assert 1 <= min_ngram <= max_ngram
        self._min_ngram = min_ngram
        self._max_ngram = max_ngram
        self._texts: dict[SequenceId, _Text] = {}

    def propose(self, sequence: Sequence, num_tokens: int) -> tuple[int, ...]:
        """Tokens that may follow those of `sequence`: at most `num_tokens`, none when nothing is alike."""
        text = self._texts.get(sequence.sequence_id)
        if text is None:
            text = self._texts[sequence.sequence_id] = _Text(sequence, self._min_ngram)
        text.extend(sequence.token_ids)
        end = text.find(self._max_ngram)
        return text.continuation(end, num_tokens) if end else ()

    def release(self, sequence_id: SequenceId) -> None:
        """Forget an ended sequence. Fine for one never seen."""
        self._texts.pop(sequence_id, None)


class _Text:
    """A sequence's tokens and the chains through them. A place is the number of tokens before it."""

    def __init__(self, sequence: Sequence, min_ngram: int) -> None:
        self._min_ngram = min_ngram
        self._token_ids = list(sequence.request.prompt_token_ids)
        for clip in sequence.request.clips:
            self._token_ids[clip.offset : clip.offset + clip.num_tokens] = range(
                -1 - clip.offset, -1 - clip.offset - clip.num_tokens, -1
            )
        self._newest: dict[tuple[int, ...], int] = {}
        """The last `min_ngram` tokens -> the last place before the end that has them."""
        self._previous = [0] * min_ngram
        """Place -> the last place before it with the same `min_ngram` tokens, or 0."""

    def extend(self, token_ids: list[int]) -> None:
        """Take in what has been added to the sequence. Its end itself stays out of the chains."""
        known, n = self._token_ids, self._min_ngram
        known += token_ids[len(known) :]
        for place in range(len(self._previous), len(known)):
            ngram = tuple(known[place - n : place])
            self._previous.append(self._newest.get(ngram, 0))
            self._newest[ngram] = place

    def find(self, max_ngram: int) -> int:
        """The place most like the end, or 0."""
        best = best_length = 0
        place = self._newest.get(tuple(self._token_ids[-self._min_ngram :]), 0)
        for _ in range(MAX_CANDIDATES):
            if place == 0 or best_length == max_ngram:
                break
            length = self._agreement(place, max_ngram)
            if length > best_length:
                best, best_length = place, length
            place = self._previous[place]
        return best

    def continuation(self, place: int, num_tokens: int) -> tuple[int, ...]:
        """What followed at `place`, up to a placeholder."""
        known = self._token_ids
        following = known[place : place + num_tokens]
        period = len(known) - place
        while len(following) < num_tokens:
            following.append(following[-period])
        return tuple(takewhile(lambda token_id: token_id >= 0, following))

    def _agreement(self, place: int, max_ngram: int) -> int:
        """Equal tokens before `place` and before the end, those of the chain included."""
        known = self._token_ids
        length, limit = self._min_ngram, min(max_ngram, place)
        while length < limit and known[place - length - 1] == known[-length - 1]:
            length += 1
        return length
