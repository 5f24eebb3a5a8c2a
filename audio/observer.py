"""What an `AudioLoader` tells of its work: how long the stages of a clip took, and what its file was.

Stages: `fetch` (over the network), `decode` (resampling and hashing included), `resample` (that part of it alone).
Calls come from the loop and from worker threads; they must be quick and must not raise.
"""

from typing import Protocol


class LoadObserver(Protocol):
    """Who wants to know."""

    def stage(self, name: str, began: float, ended: float) -> None:
        """A stage is through, or has failed. Seconds of `time.monotonic`."""

    def file(self, num_bytes: int, container: str) -> None:
        """A file is there, before it is decoded; `container` is what its first bytes say, `unknown` if nothing."""


class _Nobody:
    def stage(self, name: str, began: float, ended: float) -> None:
        """Nothing."""

    def file(self, num_bytes: int, container: str) -> None:
        """Nothing."""


NOBODY: LoadObserver = _Nobody()
