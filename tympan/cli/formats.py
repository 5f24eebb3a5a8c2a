"""The formats of transcripts that the command line writes."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """What is written, by its suffix."""

    SRT = "srt"
    VTT = "vtt"
    TXT = "txt"
    JSON = "json"

    @property
    def response_format(self) -> str:
        """As the API calls it."""
        return {"txt": "text", "json": "verbose_json"}.get(self, self)
