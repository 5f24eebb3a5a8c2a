"""Which attention backend runs, and why. The start-up line prints the answer."""

from __future__ import annotations

from model.attention.base import AttentionBackend
from model.attention.reference import ReferenceBackend
from model.errors import ConfigError


def select_backend(name: str) -> tuple[AttentionBackend, str]:
    """Resolve `--attention-backend`. -> (backend, reason). Raises ConfigError for a name we do not have."""
    if name in ("auto", "reference"):
        reason = "asked for" if name == "reference" else "plain torch, the only backend built so far"
        return ReferenceBackend(), reason
    raise ConfigError(f"attention backend {name!r} is not available; choose auto or reference")
