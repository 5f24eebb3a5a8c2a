"""Which tokens a sequence with a grammar may have next: one matcher for each, and the masks of a step. Torch-free.

A grammar is compiled in a thread, before the scheduler sees its sequence, so nobody waits for it; the ones seen last
are kept and copied. A step's masks are filled in threads (the library lets go of the interpreter) while the device
computes the logits. `advance` moves the matchers on with what was sampled; a preempted sequence keeps its matcher.

The ends of an answer are the request's stop ids that are control tokens. They are allowed where the grammar may end,
and only there. An answer to which nothing can be added is complete: it ends at once, `min_tokens` and `ignore_eos`
notwithstanding. Ids without a token, in the padding of the embedding, are never allowed. A stop id that is text is a
token like any other: where the grammar allows it, it ends the answer, finished or not.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from engine.answer import SampledToken
from engine.cores import usable_cores
from engine.log_lines import log_bug
from engine.messages import SequenceId
from engine.sample_row import SampleRow
from engine.sequence import Sequence

logger = logging.getLogger(__name__)

NO_TOKEN = "the grammar allows no further token"
NOT_COMPILED = "the grammar could not be compiled"
CACHE_SIZE = 64
"""Compiled grammars that are kept."""
MAX_LEXER_STATES = 20_000
"""Of one matcher, a kilobyte or two each."""
MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """What some rows of a batch may sample."""

    rows: tuple[int, ...]
    """Of the batch, distinct."""
    allowed: NDArray[np.uint8]
    """[R, ceil(V / 32) * 4]: one bit for each id, the lowest bit first."""
    forced: tuple[tuple[int, int], ...] = ()
    """(row, token id): nothing else is allowed, whatever the sampling parameters say."""


@dataclass(slots=True, eq=False)
class _Matched:
    """A sequence's matcher, and what is known of its next token."""

    matcher: LLMatcher
    ends: frozenset[int]
    """Ids that end the answer where the grammar may end."""


class Guidance:
    """Keyed by sequence ids, and by request ids while compiling. Of one thread, its own threads aside."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        """Grammar -> a matcher at its start. Only the compiling thread touches it."""
        self._compiling: dict[str, tuple[list[Sequence], Future[_Matched]]] = {}
        self._matched: dict[SequenceId, _Matched] = {}
        self._failed: set[SequenceId] = set()
        """Those whose mask of this step came out empty."""
        self._compiler = ThreadPoolExecutor(1, "grammar")
        self._filler = ThreadPoolExecutor(1, "mask")

    @property
    def is_compiling(self) -> bool:
        """Whether `take_compiled` has something to give, now or later."""
        return bool(self._compiling)

    def knows(self, request_id: str) -> bool:
        """Whether a request of this id is being compiled."""
        return request_id in self._compiling

    def compile(self, sequences: list[Sequence]) -> None:
        """Begin to make the matchers of a request's sequences; `take_compiled` gives them back together."""
        sampling = sequences[0].sampling
        assert sampling.grammar is not None
        future = self._compiler.submit(self._match, sampling.grammar, sampling.stop_token_ids)
        self._compiling[sequences[0].request_id] = (sequences, future)

    def take_compiled(self, wait_s: float) -> list[tuple[Sequence, str | None]]:
        """Sequences that can be scheduled, or else why not; waits for the first at most `wait_s`."""
        if self._compiling:
            wait([future for _, future in self._compiling.values()], wait_s, FIRST_COMPLETED)
        done = [request_id for request_id, (_, future) in self._compiling.items() if future.done()]
        return [item for request_id in done for item in self._take_one(request_id)]

    def _take_one(self, request_id: str) -> list[tuple[Sequence, str | None]]:
        sequences, future = self._compiling.pop(request_id)
        if error := future.exception():
            log_bug(logger, "a grammar could not be compiled", error)
        if error or future.result().matcher.is_error():
            return [(sequence, NOT_COMPILED) for sequence in sequences]
        matched = future.result()
        for sequence in sequences:
            self._matched[sequence.sequence_id] = replace(matched, matcher=matched.matcher.deep_copy())
        return [(sequence, None) for sequence in sequences]

    def abort(self, request_id: str) -> None:
        """Forget a request that is being compiled, if it is."""
        self._compiling.pop(request_id, None)

    def release(self, sequence_id: SequenceId) -> None:
        """Forget an ended sequence. Fine for one never seen."""
        self._matched.pop(sequence_id, None)
        self._failed.discard(sequence_id)

    def fill(self, batch: list[SampleRow]) -> Future[TokenMasks] | None:
        """Begin to fill the masks of a batch, if it has rows with a grammar."""
        rows = [
            (row, sampled.sequence, self._matched[sampled.sequence_id])
            for row, sampled in enumerate(batch)
            if sampled.sequence_id in self._matched
        ]
        return self._filler.submit(self._fill, rows) if rows else None

    def advance(
        self, sampled: Mapping[SequenceId, tuple[SampledToken, ...]]
    ) -> dict[SequenceId, tuple[SampledToken, ...]]:
        """Move the matchers on by a token. -> the same tokens; marked where the answer ends or cannot go on."""
        return {
            sequence_id: (self._advance(sequence_id, matched, tokens[0]),)
            if (matched := self._matched.get(sequence_id)) and tokens[0].error is None
            else tokens
            for sequence_id, tokens in sampled.items()
        }

    def _advance(self, sequence_id: SequenceId, matched: _Matched, token: SampledToken) -> SampledToken:
        if sequence_id in self._failed:
            return replace(token, error=NO_TOKEN)
        if token.token_id in matched.ends or token.token_id in self._eos_ids:
            return replace(token, complete=True)
        if not matched.matcher.consume_token(token.token_id):
            return replace(token, error=NO_TOKEN)
        return replace(token, complete=True) if matched.matcher.is_stopped() else token

    def _fill(self, rows: list[tuple[int, Sequence, _Matched]]) -> TokenMasks:
        bits = allocate_token_bitmask(len(rows), self._vocab_size)
        matchers = [(matched.matcher, index) for index, (_, _, matched) in enumerate(rows)]
        fill_next_token_bitmask_par(self._threads, matchers, bits)
        allowed = bits.view(np.uint8)
        forced = []
        for index, (row, sequence, matched) in enumerate(rows):
            if (token_id := self._finish_row(allowed[index], sequence, matched)) is not None:
                forced.append((row, token_id))
        return TokenMasks(tuple(row for row, _, _ in rows), allowed, tuple(forced))

    def _finish_row(self, allowed: NDArray[np.uint8], sequence: Sequence, matched: _Matched) -> int | None:
        """Put the request's ends in the place of the library's. -> the id to force when no other is left."""
        may_end = _take(allowed, self._eos_ids[0])
        for token_id in self._eos_ids:
            _take(allowed, token_id)
        if matched.matcher.is_error() or not (may_end or allowed.any()):
            self._failed.add(sequence.sequence_id)
            return self._eos_ids[0]
        self._failed.discard(sequence.sequence_id)
        if not _without_barred(allowed, sequence).any():
            return _first(allowed) if allowed.any() else min(matched.ends, default=self._eos_ids[0])
        for token_id in matched.ends if may_end else ():
            allowed[token_id >> 3] |= 1 << (token_id & 7)
        return None

    def _match(self, grammar: str, stop_token_ids: tuple[int, ...]) -> _Matched:
        """In the compiling thread."""
        start = self._compiled.get(grammar)
        if start is None:
            limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
            start = self._compiled[grammar] = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
            start.compute_bitmask()  # the first takes longest, and its states serve the copies
        self._compiled.move_to_end(grammar)
        if len(self._compiled) > CACHE_SIZE:
            self._compiled.popitem(last=False)
        ends = frozenset(token_id for token_id in stop_token_ids if self._is_control(token_id))
        return _Matched(start, ends)

    def _is_control(self, token_id: int) -> bool:
        """Whether it is a control token, and neither text nor padding."""
        is_padding = self._tokenizer.decode_bytes([token_id]) == f"<[{token_id}]>".encode()
        return self._tokenizer.is_special_token(token_id) and not is_padding

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Made by the compiling thread when first needed: a large vocabulary takes a second."""
        eos = list(self._eos_token_ids) or None
        return LLTokenizer(str(self._tokenizer_file), n_vocab=self._vocab_size, eos_token=eos)

    @cached_property
    def _eos_ids(self) -> tuple[int, ...]:
        """What the library takes for the end."""
        return tuple(self._tokenizer.eos_tokens)

    @cached_property
    def _threads(self) -> LLExecutor:
        return LLExecutor(min(MAX_THREADS, max(1, usable_cores() // 2)))


def _take(allowed: NDArray[np.uint8], token_id: int) -> bool:
    """Clear a bit. -> whether it was set."""
    bit = 1 << (token_id & 7)
    was_set = bool(allowed[token_id >> 3] & bit)
    allowed[token_id >> 3] &= 0xFF ^ bit
    return was_set


def _without_barred(allowed: NDArray[np.uint8], sequence: Sequence) -> NDArray[np.uint8]:
    """What is left of a row where `min_tokens` bars the stop ids."""
    sampling = sequence.sampling
    if sequence.num_output_tokens >= sampling.min_tokens:
        return allowed
    left = allowed.copy()
    for token_id in sampling.stop_token_ids:
        _take(left, token_id)
    return left


def _first(allowed: NDArray[np.uint8]) -> int:
    """The lowest id of a row that has one."""
    return int(np.flatnonzero(np.unpackbits(allowed, bitorder="little"))[0])
