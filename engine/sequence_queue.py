"""Sequences that wait and sequences that run, each line in order of rank. Torch-free; the scheduler's.

Owner of a sequence's status, and of which choices of a request have not ended. Decides nothing: who starts, who is
sent back and who ends is the scheduler's business.
"""

from __future__ import annotations

from bisect import insort

from engine.sequence import Sequence, SequenceStatus


class SequenceQueue:
    """`add`, `start`, `send_back`, `remove`: a sequence stands in one of the lines until it has ended."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._choices: dict[str, list[Sequence]] = {}
        """By request id: the choices that have not ended."""
        self._num_arrivals = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. A request's choices come one right after the other; its id must not be in use."""
        choices = self._choices.setdefault(sequence.request_id, [])
        assert all(choice.request is sequence.request for choice in choices), "request ids are unique"
        assert all(choice.index < sequence.index for choice in choices), "choices come in order"
        if not choices:
            self._num_arrivals += 1
        sequence.arrival = self._num_arrivals
        choices.append(sequence)
        insort(self.waiting, sequence, key=_rank)

    def knows(self, request_id: str) -> bool:
        """Whether a request of this id is waiting or running."""
        return request_id in self._choices

    def choices_of(self, request_id: str) -> list[Sequence]:
        """Those of a request that have not ended, in order."""
        return list(self._choices.get(request_id, ()))

    def start(self, sequence: Sequence) -> None:
        """From the line that waits to the one that runs."""
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_rank)
        sequence.status = SequenceStatus.RUNNING

    def send_back(self, sequence: Sequence) -> None:
        """From the line that runs to its old place among those that wait."""
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=_rank)
        sequence.status = SequenceStatus.WAITING

    def remove(self, sequence: Sequence) -> None:
        """It has ended."""
        (self.running if runs(sequence) else self.waiting).remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        choices = self._choices[sequence.request_id]
        choices.remove(sequence)
        if not choices:
            del self._choices[sequence.request_id]

    def check_integrity(self) -> None:
        """Nobody is lost or stands in line twice. Raises AssertionError."""
        line = [*self.running, *self.waiting]
        assert {choice for choices in self._choices.values() for choice in choices} == set(line)
        assert sum(map(len, self._choices.values())) == len(line)
        assert all(self._choices.values()), "an ended request is remembered"


def runs(sequence: Sequence) -> bool:
    """Whether it is among those that steps compute."""
    return sequence.status is SequenceStatus.RUNNING


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank
