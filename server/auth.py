"""API keys. Only hashes are kept, and every key is compared in full: the time taken tells nothing."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable

from server.errors import ApiError

EVERYBODY = ""
"""The caller's name where no keys are set."""


class ApiKeys:
    """The keys that open /v1. Without any, everything is open."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, authorization: str | None) -> str:
        """Who calls: a name for the key in the Authorization header, one for all where there are no keys.

        Raises ApiError (401) unless the header holds a key.
        """
        if not self._digests:
            return EVERYBODY
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("You didn't provide an API key. Send it as: Authorization: Bearer YOUR_KEY", None)
        digest = hashlib.sha256(key.strip().encode(errors="surrogateescape")).digest()
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise _unauthorized("Incorrect API key provided.", "invalid_api_key")
        return digest.hex()


def _unauthorized(message: str, code: str | None) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})
