"""The progress of a batch on one line: requests done, requests a second, seconds of audio heard a second."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from model.config import SAMPLE_RATE, num_audio_tokens

TOKENS_PER_SECOND = num_audio_tokens(SAMPLE_RATE)


class Progress:
    """A bar on stderr. `shown`: None shows it on a terminal only."""

    def __init__(self, total: int, *, done: int = 0, shown: bool | None = None) -> None:
        self._bar = tqdm(total=total, initial=done, unit=" requests", disable=None if shown is None else not shown)
        self._started = time.monotonic()
        self._audio_tokens = 0

    def advance(self, body: Mapping[str, Any] | None = None) -> None:
        """One request is done; `body` is its answer, if it has one."""
        usage = (body or {}).get("usage") or {}
        self._audio_tokens += (usage.get("prompt_tokens_details") or {}).get("audio_tokens") or 0
        self._bar.set_postfix_str(f"audio {self.audio_seconds / self._elapsed:.1f} s/s", refresh=False)
        self._bar.update()

    @property
    def audio_seconds(self) -> float:
        """Of audio heard so far, by the tokens that it took."""
        return self._audio_tokens / TOKENS_PER_SECOND

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    @property
    def _elapsed(self) -> float:
        return max(time.monotonic() - self._started, 1e-3)
