"""What the bodies of all requests hold of this machine together: memory, and disk.

Whoever reads a body says what it holds by now; who would take more than there is gets 503, and gives back what he
had. So a thousand bodies at once cost no more than a few. Touched on the event loop only.
"""

from __future__ import annotations

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


@dataclass(slots=True)
class HeldBytes:
    """A request's part of both budgets."""

    memory: Budget = field(default_factory=Budget)
    disk: Budget = field(default_factory=Budget)
    _in_memory: int = 0
    _on_disk: int = 0

    def hold(self, *, memory: int, disk: int) -> None:
        """So many bytes by now, instead of what it was. Raises ApiError (503) where there is no room for more."""
        self._in_memory = _changed(self.memory, self._in_memory, memory)
        self._on_disk = _changed(self.disk, self._on_disk, disk)

    def release(self) -> None:
        """Nothing any more."""
        self.hold(memory=0, disk=0)


def _changed(budget: Budget, before: int, now: int) -> int:
    if now > before and budget.num_bytes + now - before > budget.max_bytes:
        raise overloaded("The server is full: it has no room for the body of another request.")
    budget.num_bytes += now - before
    return now


def overloaded(message: str) -> ApiError:
    """A 503: balancers and clients turn to another replica, or come back."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(503, message, UNAVAILABLE, code="server_overloaded", headers=headers)
