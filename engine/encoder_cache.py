"""Which clips' embeddings are on the device. Torch-free accounting; the runner holds the tensors.

An entry is keyed by the clip's content hash, so identical clips in flight are encoded once. A sequence holds a
reference from the step that first needs the clip until its last placeholder is computed. Unreferenced entries
stay until room is needed and go in order of last use. The budget is in bytes: a clip takes a row of embeddings for
each of its audio tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.messages import AudioClip, SequenceId


@dataclass(slots=True)
class _Entry:
    num_bytes: int
    holders: set[SequenceId] = field(default_factory=set)


class EncoderCache:
    """See the module's docstring."""

    def __init__(self, capacity: int, row_bytes: int) -> None:
        """capacity: bytes; at least one whole clip's. row_bytes: of one audio token's embedding."""
        self.capacity = capacity
        self.row_bytes = row_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._evicted: list[str] = []
        self.num_queries = 0
        """Clips that sequences began to hold."""
        self.num_hits = 0
        """Those of them that were not added for it."""

    def has(self, clip: AudioClip) -> bool:
        """Whether the clip's embeddings are there, or will be by the end of this step's encoder run."""
        return clip.content_hash in self._entries

    def is_held(self, clip: AudioClip) -> bool:
        """Whether some sequence needs the clip now."""
        entry = self._entries.get(clip.content_hash)
        return entry is not None and bool(entry.holders)

    def can_hold(self, num_tokens: int) -> bool:
        """Whether clips of `num_tokens` in all, not held so far, fit beside those that are."""
        held = sum(entry.num_bytes for entry in self._entries.values() if entry.holders)
        return held + num_tokens * self.row_bytes <= self.capacity

    def add(self, clip: AudioClip) -> None:
        """Reserve room for a clip about to be encoded. Call `can_hold` first."""
        assert clip.content_hash not in self._entries, "one entry for each hash"
        num_bytes = clip.num_tokens * self.row_bytes
        used = sum(entry.num_bytes for entry in self._entries.values())
        for content_hash in [key for key, entry in self._entries.items() if not entry.holders]:
            if used + num_bytes <= self.capacity:
                break
            used -= self._entries[content_hash].num_bytes
            self.drop(content_hash)
        self._entries[clip.content_hash] = _Entry(num_bytes)
        self.num_hits -= 1  # it will be held at once

    def hold(self, clip: AudioClip, holder: SequenceId) -> None:
        """Keep the clip for a sequence, and mark it as used."""
        holders = self._entries[clip.content_hash].holders
        if holder not in holders:
            holders.add(holder)
            self.num_queries += 1
            self.num_hits += 1
        self._entries.move_to_end(clip.content_hash)

    def release(self, clips: Iterable[AudioClip], holder: SequenceId, before: int | None = None) -> None:
        """The sequence needs no more those of its clips that end at or before a position; None: any of them."""
        clips = tuple(clips)
        inside = {
            clip.content_hash for clip in clips if before and clip.offset < before < clip.offset + clip.num_tokens
        }
        for clip in clips:
            ended = before is None or clip.offset + clip.num_tokens <= before
            if ended and clip.content_hash not in inside:  # the same audio may come twice in one prompt
                self.holders(clip.content_hash).discard(holder)

    def holders(self, content_hash: str) -> set[SequenceId]:
        """Sequences that need a clip now."""
        entry = self._entries.get(content_hash)
        return entry.holders if entry else set()

    def drop(self, content_hash: str) -> None:
        """Forget an entry; the runner is told by the next `take_evicted`. No error if it is not there."""
        if self._entries.pop(content_hash, None):
            self._evicted.append(content_hash)

    def clear(self) -> None:
        """Forget all entries."""
        for content_hash in list(self._entries):
            self.drop(content_hash)

    def take_evicted(self) -> tuple[str, ...]:
        """Hashes dropped since the last call, for the runner to free. One that came back is not among them."""
        gone = tuple(key for key in self._evicted if key not in self._entries)
        self._evicted.clear()
        return gone

    def check_integrity(self, running: set[SequenceId]) -> None:
        """Only running sequences hold clips, and the budget is kept. Raises AssertionError."""
        for entry in self._entries.values():
            assert entry.holders <= running, "a sequence that does not run holds a clip"
        assert sum(entry.num_bytes for entry in self._entries.values()) <= self.capacity
