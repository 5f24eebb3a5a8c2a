"""How much one clip may cost, and how far the server goes to get it.

Both values are frozen and checked when made, so a wrong setting stops the start-up and not a
request. Limits are enforced while bytes arrive and while samples are decoded, never afterwards.
The model's own 30 s window and its shortest clip are not here: they belong to the server's policy.
"""

import math
from dataclasses import dataclass

from audio.errors import AudioLimitError

MIB = 1024 * 1024
GIB = 1024 * MIB


@dataclass(frozen=True, slots=True)
class AudioLimits:
    """Bounds on one clip, whatever its origin.

    `max_decoded_bytes` bounds the work a header can ask for (frames x channels x 4 bytes of float32,
    before the mix to mono); at most one block of it is ever in memory. The default admits ten minutes
    of eight channels at 48 kHz.
    """

    max_clip_bytes: int = 25 * MIB
    max_clip_seconds: float = 600.0
    max_decoded_bytes: int = 1 * GIB
    min_sample_rate: int = 4_000
    max_sample_rate: int = 384_000
    max_channels: int = 8

    def __post_init__(self) -> None:
        _require_positive(self, "max_clip_bytes", "max_clip_seconds", "max_decoded_bytes", "max_channels")
        if not 0 < self.min_sample_rate <= self.max_sample_rate:
            raise ValueError("sample rates must satisfy 0 < min_sample_rate <= max_sample_rate")

    def check_clip_bytes(self, num_bytes: int) -> None:
        """Raises AudioLimitError `audio_too_large` for a file of more bytes than allowed."""
        if num_bytes > self.max_clip_bytes:
            raise AudioLimitError(
                "audio_too_large", f"The audio is larger than the limit of {self.max_clip_bytes / MIB:g} MiB."
            )


@dataclass(frozen=True, slots=True)
class DecoderLimits:
    """What a decoder's process may take, beside what `AudioLimits` allow a file. Times are seconds.

    `cpu_s` is processor time of one step: a whole clip, or one window of a long file. `wall_s` is how long an
    answer is waited for: several times more, because a busy machine may let a decoder wait. `memory_bytes` is
    address space, of which a file that is in order touches a small part.
    """

    cpu_s: float = 20.0
    wall_s: float = 120.0
    memory_bytes: int = 256 * MIB

    def __post_init__(self) -> None:
        _require_positive(self, "cpu_s", "wall_s", "memory_bytes")


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """Where media links may lead and how long they may take. Times are seconds.

    `allowed_domains` (empty: any) holds exact hosts, or suffixes written with a leading dot.
    `allowed_private_hosts` lifts the public-address rule, and only that rule, for an exact `host`
    (any port) or `host:port`; an IPv6 host with a port is written `[::1]:8080`.
    """

    connect_timeout_s: float = 3.0
    read_timeout_s: float = 5.0
    pool_timeout_s: float = 5.0
    total_timeout_s: float = 30.0
    max_redirects: int = 3
    max_url_chars: int = 2048
    max_connections: int = 32
    max_connections_per_host: int = 4
    allowed_domains: frozenset[str] = frozenset()
    allowed_private_hosts: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "connect_timeout_s",
            "read_timeout_s",
            "pool_timeout_s",
            "total_timeout_s",
            "max_url_chars",
            "max_connections",
            "max_connections_per_host",
        )
        if self.max_redirects < 0:
            raise ValueError("max_redirects must not be negative")
        for name in ("allowed_domains", "allowed_private_hosts"):
            entries = getattr(self, name)
            if isinstance(entries, str):
                raise ValueError(f"{name} must be a collection of hosts, not one string")
            object.__setattr__(self, name, frozenset(entry.strip().lower() for entry in entries))


def _require_positive(limits: AudioLimits | DecoderLimits | FetchPolicy, *names: str) -> None:
    for name in names:
        value = getattr(limits, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite")
