"""Sound from anywhere to mono 16 kHz PCM: sources, safe fetching, bounded decoding, resampling.

The way of a clip: `AudioSource` -> (`audio.fetch`) -> bytes -> `audio.decode` in a process of its own -> `Pcm`, with
`AudioLoader` driving it. Long files go another: the decoder cuts them by `segment` into windows. Whatever is wrong
with a clip is an `AudioError`, the client's fault. Free of torch, and of the engine, the model, the server and their
settings. Codecs are loaded by `audio.decoder_process` alone, HTTP by `audio.fetch`: neither is imported here.
"""

from audio.errors import AudioDecodeError, AudioError, AudioFetchError, AudioLimitError, AudioSourceError
from audio.limits import AudioLimits, DecoderLimits, FetchPolicy
from audio.loader import AudioLoader
from audio.observer import LoadObserver
from audio.pcm import SAMPLE_RATE, Pcm
from audio.segment import segment
from audio.source import AudioFile, AudioSource, AudioUrl, InlineAudio, Text
from audio.text_file import FiledText, TextFile

__all__ = [
    "SAMPLE_RATE",
    "AudioDecodeError",
    "AudioError",
    "AudioFetchError",
    "AudioFile",
    "AudioLimitError",
    "AudioLimits",
    "AudioLoader",
    "AudioSource",
    "AudioSourceError",
    "AudioUrl",
    "DecoderLimits",
    "FetchPolicy",
    "FiledText",
    "InlineAudio",
    "LoadObserver",
    "Pcm",
    "Text",
    "TextFile",
    "segment",
]
