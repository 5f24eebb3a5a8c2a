"""Sound from anywhere to mono 16 kHz PCM: sources, safe fetching, bounded decoding, resampling.

The way of a clip: `AudioSource` -> (`MediaFetcher`) -> bytes -> `decode` -> `Pcm`, with `AudioLoader`
putting the blocking half into threads. Long files go another: blocks out of `decode_blocks`, cut by
`segment` into windows. Whatever is wrong with a clip is an `AudioError`, the client's
fault. Free of torch, and of the engine, the model, the server and their settings.
"""

from audio.decode import decode, decode_blocks
from audio.errors import AudioDecodeError, AudioError, AudioFetchError, AudioLimitError, AudioSourceError
from audio.fetch import MediaFetcher
from audio.limits import AudioLimits, FetchPolicy
from audio.loader import AudioLoader
from audio.observer import LoadObserver
from audio.pcm import SAMPLE_RATE, Pcm
from audio.segment import segment
from audio.source import AudioBytes, AudioSource, AudioUrl, InlineAudio

__all__ = [
    "SAMPLE_RATE",
    "AudioBytes",
    "AudioDecodeError",
    "AudioError",
    "AudioFetchError",
    "AudioLimitError",
    "AudioLimits",
    "AudioLoader",
    "AudioSource",
    "AudioSourceError",
    "AudioUrl",
    "FetchPolicy",
    "InlineAudio",
    "LoadObserver",
    "MediaFetcher",
    "Pcm",
    "decode",
    "decode_blocks",
    "segment",
]
