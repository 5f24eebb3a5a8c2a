"""Clips that callers have uploaded, by id: ask ten questions about one recording and send it once.

The one owner of what is kept: decoded samples as they came from the decoder (float32, 16 kHz), in memory, so that an
id gives the very answer that the file itself would. Every caller has a scope of its own and an equal share of the
memory; nobody sees, uses or displaces the clips of another. A clip stays until it expires or is deleted: when a
share is full, uploads are refused, and nothing that was promised is dropped. Ids are made from scope and content
with a secret of this process: they cannot be guessed, nor carried over. Not locked: use from one event loop.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from audio import Pcm

OVERHEAD_BYTES = 4096
"""What a clip is charged beside its samples: the smallest clips do not come in millions."""


class StoreFullError(Exception):
    """There is no room until something is deleted or expires."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class ClipTooLargeError(Exception):
    """The clip would not even fit an empty share."""


@dataclass(frozen=True, slots=True)
class StoredAudio:
    """An uploaded clip. Times are seconds since the epoch."""

    audio_id: str
    pcm: Pcm = field(repr=False)
    file_name: str
    num_bytes: int
    """Of the file that was uploaded."""
    created_at: float
    expires_at: float

    @property
    def num_held_bytes(self) -> int:
        """What it is charged."""
        return self.pcm.samples.nbytes + OVERHEAD_BYTES


class AudioStore:
    """All uploaded clips of all scopes."""

    def __init__(
        self,
        max_bytes: int,
        ttl_s: float,
        num_scopes: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_bytes = max_bytes
        self._num_scopes = num_scopes
        self.ttl_s = ttl_s
        """How long a clip is kept, at most."""
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._scopes: dict[str, dict[str, StoredAudio]] = {}
        """By scope and id; the oldest first."""

    @property
    def share_bytes(self) -> int:
        """What one scope may hold: less when there are more of them, which takes nothing away that is kept."""
        return self._max_bytes // max(1, self._num_scopes())

    def put(self, scope: str, pcm: Pcm, file_name: str, num_bytes: int, ttl_s: float | None = None) -> StoredAudio:
        """Keep a clip for `ttl_s` seconds, or as long as clips are kept. The same sound again renews it.

        Raises ClipTooLargeError, StoreFullError.
        """
        self.drop_expired()
        now = self._clock()
        lifetime = self.ttl_s if ttl_s is None else min(ttl_s, self.ttl_s)
        audio = StoredAudio(self._id(scope, pcm), pcm, file_name, num_bytes, now, now + lifetime)
        if audio.num_held_bytes > self.share_bytes:
            raise ClipTooLargeError
        others = [other for other in self._scopes.get(scope, {}).values() if other.audio_id != audio.audio_id]
        if sum(other.num_held_bytes for other in others) + audio.num_held_bytes > self.share_bytes:
            raise StoreFullError(min(other.expires_at for other in others) - now)
        clips = self._scopes.setdefault(scope, {})
        clips.pop(audio.audio_id, None)
        clips[audio.audio_id] = audio
        return audio

    def get(self, scope: str, audio_id: str) -> StoredAudio | None:
        """The clip, or None: unknown, expired and foreign ids cannot be told apart."""
        audio = self._scopes.get(scope, {}).get(audio_id)
        return audio if audio is not None and audio.expires_at > self._clock() else None

    def list(self, scope: str) -> list[StoredAudio]:
        """The scope's clips, the oldest first."""
        self.drop_expired()
        return list(self._scopes.get(scope, {}).values())

    def delete(self, scope: str, audio_id: str) -> bool:
        """Forget a clip. -> whether it was there."""
        found = self.get(scope, audio_id) is not None
        if found:
            del self._scopes[scope][audio_id]
        return found

    def drop_expired(self) -> None:
        """Forget what has had its time."""
        now = self._clock()
        for scope, clips in list(self._scopes.items()):
            for audio in [audio for audio in clips.values() if audio.expires_at <= now]:
                del clips[audio.audio_id]
            if not clips:
                del self._scopes[scope]

    def num_held_bytes(self, scope: str) -> int:
        """What the scope is charged now."""
        return sum(audio.num_held_bytes for audio in self._scopes.get(scope, {}).values())

    def _id(self, scope: str, pcm: Pcm) -> str:
        identity = f"{scope}\n{pcm.content_hash}".encode()
        return f"file-{hmac.digest(self._secret, identity, hashlib.sha256).hex()[:32]}"
