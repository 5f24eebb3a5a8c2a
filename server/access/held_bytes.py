"""What all requests hold of this machine together: memory and disk for their bodies, memory for their sound.

Whoever reads a body or decodes a clip says what the request holds by now; who would take more than there is gets
503, and gives back what he had. So a thousand requests at once cost no more than a few. Touched on the loop only.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from server.errors import UNAVAILABLE, ApiError

RETRY_AFTER_SECONDS = 2
"""Told to whoever finds the server full: another replica may take the request at once."""


@dataclass(slots=True)
class Budget:
    """Bytes of one kind that may be held."""

    max_bytes: float = math.inf
    num_bytes: int = 0
    """Held now."""

    def has_room(self, num_bytes: int) -> bool:
        """For so many more."""
        return self.num_bytes + num_bytes <= self.max_bytes


@dataclass(slots=True)
class HeldBytes:
    """A request's part of each budget."""

    memory: Budget = field(default_factory=Budget)
    disk: Budget = field(default_factory=Budget)
    audio: Budget = field(default_factory=Budget)
    """Of samples: here, and until they are encoded in the engine's process too."""
    parsing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of whoever makes values of a large body: for a moment that takes several times what the body holds."""
    _in_memory: int = 0
    _on_disk: int = 0
    _of_audio: int = 0

    def hold(self, *, memory: int, disk: int) -> None:
        """So much of its body by now, not what it was. Raises ApiError (503) where there is no room for more."""
        self._in_memory = _changed(self.memory, self._in_memory, memory)
        self._on_disk = _changed(self.disk, self._on_disk, disk)

    def hold_audio(self, num_bytes: int) -> None:
        """So many bytes of samples more. Raises ApiError (503) where there is no room for them."""
        self._of_audio = _changed(self.audio, self._of_audio, self._of_audio + num_bytes)

    def count_audio(self, num_bytes: int) -> None:
        """So many bytes of samples more, or fewer, whether there is room or not."""
        self._of_audio += num_bytes
        self.audio.num_bytes += num_bytes

    def release(self) -> None:
        """Nothing any more."""
        self.hold(memory=0, disk=0)
        self._of_audio = _changed(self.audio, self._of_audio, 0)


def _changed(budget: Budget, before: int, now: int) -> int:
    if now > before and not budget.has_room(now - before):
        raise overloaded("The server is full: it has no room for what another request holds.")
    budget.num_bytes += now - before
    return now


def overloaded(message: str) -> ApiError:
    """A 503: balancers and clients turn to another replica, or come back."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(503, message, UNAVAILABLE, code="server_overloaded", headers=headers)
