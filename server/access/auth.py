"""API keys. Only hashes are kept, and every key is compared in full: the time taken tells nothing."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence

from server.access.key_file import KeyFile, digest_of
from server.errors import ApiError

EVERYBODY = ""
"""The caller's name where no keys are set."""


class ApiKeys:
    """The keys that open the server. Without any, everything is open."""

    def __init__(self, keys: Iterable[str] = (), file: KeyFile | None = None) -> None:
        """Raises KeysError for what is no key."""
        self._digests = tuple(digest_of(key, "api-key") for key in keys)
        self._file = file

    def __len__(self) -> int:
        """How many different keys there are now."""
        return len(set(self._known()))

    def check(self, authorizations: Sequence[str]) -> str:
        """Who calls: a name for the key in the only Authorization header, one for all where there are no keys.

        Raises ApiError (401) unless the header holds a key.
        """
        known = self._known()
        if not known:
            return EVERYBODY
        scheme, _, key = (authorizations[0] if len(authorizations) == 1 else "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("You didn't provide an API key. Send it as: Authorization: Bearer YOUR_KEY", None)
        digest = hashlib.sha256(key.strip().encode(errors="surrogateescape")).digest()
        matches = [secrets.compare_digest(digest, other) for other in known]
        if not sum(matches):  # any() would stop at the first that fits
            raise _unauthorized("Incorrect API key provided.", "invalid_api_key")
        return digest.hex()

    def _known(self) -> tuple[bytes, ...]:
        return self._digests if self._file is None else self._digests + self._file.digests()


def cache_salt(caller: str, own: str | None) -> str | None:
    """What a caller's requests share computed prompts and clips under; `own`: the salt that a request brings.

    No two callers ever have the same. None: all share, where there are no keys and the request brings nothing.
    """
    if caller == EVERYBODY:
        return own
    return hashlib.sha256(f"{caller}\n{own or ''}".encode(errors="surrogatepass")).hexdigest()


def _unauthorized(message: str, code: str | None) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})
