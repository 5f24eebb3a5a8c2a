"""Finds computed blocks of the KV cache again by what they hold. Torch-free; knows keys and blocks, no holders.

A full block's key is a hash of the key of the block before it, its token ids, and, for every clip with a placeholder
in it, the clip's content hash and where in the clip the block begins. Before the first block stands a hash of the
request's cache salt. So equal keys mean equal keys and values, and no salt ever finds what another has computed. The
hash is keyed with a secret of the process: nobody outside can look for two prompts that collide.

A block is in the cache from `publish`, when its contents are known to be good, until `forget`. Blocks of equal
contents may be computed side by side; only the first is kept. Where a head is forgotten, its tail cannot be found.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterator
from hashlib import blake2b

from engine.sequence import Sequence

KEY_BYTES = 32


class PrefixCache:
    """See the module's docstring."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._secret = secrets.token_bytes(KEY_BYTES)
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def find(self, sequence: Sequence, most: int) -> list[int]:
        """The blocks that hold the beginning of `sequence`, as far as there are any; at most `most`."""
        found: list[int] = []
        for index in range(most):
            block = self._blocks.get(self._key(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def publish(self, sequence: Sequence, num_blocks: int) -> None:
        """Let the first blocks of `sequence` be found. They must be full, and computed without error."""
        for index in range(sequence.num_published_blocks, num_blocks):
            key = self._key(sequence, index)
            if key not in self._blocks:
                block = sequence.block_table[index]
                self._blocks[key] = block
                self._keys[block] = key
        sequence.num_published_blocks = max(sequence.num_published_blocks, num_blocks)

    def forget(self, block: int) -> None:
        """What the block holds will be overwritten. No error if it is not in the cache."""
        if (key := self._keys.pop(block, None)) is not None:
            del self._blocks[key]

    def check_integrity(self) -> None:
        """Keys and blocks belong together one to one. Raises AssertionError."""
        assert {block: key for key, block in self._blocks.items()} == self._keys
        assert len(self._blocks) == len(self._keys)

    def _key(self, sequence: Sequence, index: int) -> bytes:
        keys = sequence.block_keys
        if not keys:
            salt = sequence.request.cache_salt or ""
            keys.append(self._chain(self._hash(salt.encode(errors="surrogatepass")), sequence, 0))
        while len(keys) <= index:
            keys.append(self._chain(keys[-1], sequence, len(keys)))
        return keys[index]

    def _chain(self, parent: bytes, sequence: Sequence, index: int) -> bytes:
        """The key of the block at `index`. What is hashed has a form that no other contents share."""
        start, stop = index * self.block_size, (index + 1) * self.block_size
        ids = array("q", sequence.token_ids[start:stop]).tobytes()
        clips = (
            f"{start - clip.offset} {len(clip.content_hash)} {clip.content_hash}"
            for clip in sequence.clips_within(start, stop)
        )
        return self._hash(parent + ids + "".join(clips).encode(errors="surrogatepass"))

    def _hash(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=KEY_BYTES, key=self._secret).digest()
