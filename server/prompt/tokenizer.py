"""Text to ids and ids to bytes, with the control tokens kept apart from what callers write.

Two encoders over one tokenizer.json: `encode` has no special tokens at all, so no text can become one; `special`
finds them in text that is trusted. Together they give the very ids of the original tokenizer (see
builder.py). For the way back, every id has its bytes, as byte-level BPE defines them (GPT-2's map).
Knows nothing of chats or audio.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Encoder

from model.config import read_json
from model.errors import ConfigError


def _byte_map() -> dict[str, int]:
    """GPT-2's printable stand-ins: visible Latin-1 characters are themselves, the rest is moved above U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + k): byte for k, byte in enumerate(moved)}


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer. Safe to share between threads."""

    _encoder: Encoder
    special: dict[str, int]
    """Control tokens: text to id."""
    special_ids: frozenset[int]
    special_pattern: re.Pattern[str]
    """Finds them, the longest where several begin at one place. Without any, it matches nothing."""
    token_bytes: tuple[bytes, ...]
    """By id. Control tokens have their text's bytes; holes in the vocabulary have none."""
    max_token_bytes: int
    """Of the longest ordinary token."""

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read `folder`/tokenizer.json. Raises ConfigError when it is missing or of another kind."""
        return cls.from_json(read_json(folder / "tokenizer.json"))

    @classmethod
    def from_json(cls, raw: dict[str, object]) -> Tokenizer:
        """Read the content of a tokenizer.json. Raises ConfigError."""
        added = raw.get("added_tokens") or []
        if not isinstance(added, list):
            raise ConfigError("tokenizer.json: added_tokens must be a list")
        special = {token["content"]: token["id"] for token in added if token["special"]}
        ordinary = [token for token in added if not token["special"]]
        try:
            encoder = Encoder.from_str(json.dumps({**raw, "added_tokens": ordinary, "post_processor": None}))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"tokenizer.json cannot be read: {error}") from None
        special_ids = frozenset(special.values())
        longest_first = sorted(special, key=len, reverse=True)
        token_bytes = _bytes_by_id(encoder, {token["id"]: token["content"] for token in added})
        ordinary_bytes = (token for id_, token in enumerate(token_bytes) if id_ not in special_ids)
        return cls(
            _encoder=encoder,
            special=special,
            special_ids=special_ids,
            special_pattern=re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"),
            token_bytes=token_bytes,
            max_token_bytes=max(map(len, ordinary_bytes), default=1),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Never a control token, whatever the text says."""
        return self._encoder.encode(text, add_special_tokens=False).ids

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes. Ids past the vocabulary (the embedding is padded) have none."""
        return self.token_bytes[token_id] if 0 <= token_id < len(self.token_bytes) else b""


def _bytes_by_id(encoder: Encoder, added: dict[int, str]) -> tuple[bytes, ...]:
    stand_ins = _byte_map()
    vocabulary = encoder.get_vocab(with_added_tokens=False)
    table = [b""] * (max([*vocabulary.values(), *added]) + 1)
    for text, token_id in vocabulary.items():
        try:
            table[token_id] = bytes(stand_ins[char] for char in text)
        except KeyError:
            raise ConfigError("tokenizer.json is not a byte-level vocabulary") from None
    for token_id, text in added.items():
        table[token_id] = text.encode()
    return tuple(table)
