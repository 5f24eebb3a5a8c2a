"""A server that speaks OpenAI's API, as commands reach it: its address, its key, its failures in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from tympan.cli.errors import CommandError

TIMEOUT = httpx.Timeout(600.0, connect=10.0)
"""The read timeout of OpenAI's clients."""
MAX_MESSAGE_CHARS = 500


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go."""

    url: str
    """Ends in the API's version, as OPENAI_BASE_URL does."""
    api_key: str | None = None

    @classmethod
    def of(cls, url: str, api_key: str | None) -> Endpoint:
        """From what a person writes: without a path it is the server's /v1. Raises CommandError."""
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CommandError(f"--url {url}: an address is http://HOST:PORT/v1, or https", status=2)
        return cls(url.rstrip("/") + ("/v1" if parts.path in ("", "/") else ""), api_key or None)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of an httpx client, synchronous or not."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"base_url": self.url, "headers": headers, "timeout": TIMEOUT}

    def client(self) -> httpx.Client:
        """To be closed by whoever asks for it."""
        return httpx.Client(**self.options)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """What goes wrong on the way becomes a CommandError that says what to do."""
        try:
            yield
        except httpx.ConnectError:
            message = f"nobody answers at {self.url}: start a server with `tympan serve`, or name another by --url"
            raise CommandError(message) from None
        except httpx.HTTPError as error:
            raise CommandError(f"{self.url}: {type(error).__name__} {error}".rstrip()) from None


def first_model(client: httpx.Client) -> str:
    """The id of the first model that a server lists. Raises CommandError and httpx.HTTPError."""
    response = client.get("models")
    check(response)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise CommandError(f"{response.url} lists no model: name one by --model") from None


def check(response: httpx.Response) -> None:
    """Raises CommandError for an answer that is none; its body has to have been read."""
    if response.status_code == httpx.codes.UNAUTHORIZED:
        raise CommandError("the server asks for a key: give it by --api-key or in OPENAI_API_KEY")
    if not response.is_success:
        raise CommandError(f"HTTP {response.status_code}: {message_of(response)}")


def message_of(response: httpx.Response) -> str:
    """What OpenAI's error envelope says; of anything else, its beginning."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return " ".join(response.text.split())[:MAX_MESSAGE_CHARS] or response.reason_phrase
