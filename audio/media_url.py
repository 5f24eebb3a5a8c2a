"""One parser for media links, and the rules that need no network.

A link is parsed once, by httpx, and only the parsed value is used from then on: two parsers that
disagree on where a host ends are how address checks get bypassed. What they are known to disagree on
(user info, backslashes, control characters) is refused. Addresses are the dialler's business.
"""

import httpx

from audio.errors import AudioFetchError, AudioSourceError
from audio.limits import FetchPolicy

_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_PORT = 65_535


def parse_media_url(text: str, policy: FetchPolicy, base: httpx.URL | None = None) -> httpx.URL:
    """The checked link; relative to `base` where a redirect gives one.

    Raises AudioSourceError `invalid_audio_url` or AudioFetchError `media_url_refused`.
    """
    if len(text) > policy.max_url_chars:
        raise _invalid(f"The audio URL is longer than {policy.max_url_chars} characters.")
    if any(char <= " " or char in "\\\x7f" for char in text):
        raise _invalid("The audio URL holds a space, a backslash or a control character.")
    try:
        url = httpx.URL(text) if base is None else base.join(text)
        host, port = host_of(url), port_of(url)
    except (httpx.InvalidURL, ValueError, KeyError, TypeError):
        raise _invalid("The audio URL is malformed, or is neither http nor https.") from None
    if not host or "%" in host or not 1 <= port <= _MAX_PORT:
        raise _invalid("The audio URL has no valid host and port.")
    if url.userinfo:
        raise _invalid("The audio URL must not carry a user name or password.")
    if policy.allowed_domains and not _is_listed(host, policy.allowed_domains):
        raise AudioFetchError("media_url_refused", "The audio URL's host is not on the list of allowed ones.")
    return url


def host_of(url: httpx.URL) -> str:
    """The host as it is compared and resolved: ASCII, lower case, no final dot."""
    return normalize_host(url.raw_host.decode("ascii"))


def normalize_host(host: str) -> str:
    return host.lower().rstrip(".")


def port_of(url: httpx.URL) -> int:
    """The port to dial. Raises KeyError for a scheme that is neither http nor https."""
    default_port = _DEFAULT_PORTS[url.scheme]
    return default_port if url.port is None else url.port


def is_private_host_allowed(host: str, port: int, policy: FetchPolicy) -> bool:
    """Whether the operator named this very host, or host and port, as an exception."""
    with_port = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return host in policy.allowed_private_hosts or with_port in policy.allowed_private_hosts


def _is_listed(host: str, domains: frozenset[str]) -> bool:
    return host in domains or any(domain.startswith(".") and host.endswith(domain) for domain in domains)


def _invalid(message: str) -> AudioSourceError:
    return AudioSourceError("invalid_audio_url", message)
