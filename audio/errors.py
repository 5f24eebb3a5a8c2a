"""What can be wrong with a clip: every class here is the client's fault and maps to HTTP 400.

AudioError                    code and message, both safe to send back
├── AudioSourceError          the reference itself: bad base64, bad data: URL, bad link
├── AudioFetchError           the link could not, or may not, be followed
├── AudioDecodeError          the bytes are not audio this server reads
└── AudioLimitError           readable, but over a limit of `audio.limits.AudioLimits`

A message never holds a path, a memory address, a resolved IP, an origin's body or another
exception's text: codecs put pointers into theirs, and origins put secrets. Knows nothing of HTTP.
"""


class AudioError(Exception):
    """A clip that cannot be used. `code` is stable and for machines; `message` is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class AudioSourceError(AudioError):
    """The reference to the clip is malformed: `invalid_base64`, `invalid_audio_url`, `audio_empty`."""


class AudioFetchError(AudioError):
    """The link was refused (`media_url_refused`) or failed (`media_fetch_failed`)."""


class AudioDecodeError(AudioError):
    """The bytes are not usable audio: `unsupported_audio`, `invalid_audio`, `audio_empty`."""


class AudioLimitError(AudioError):
    """Over a limit: `audio_too_large` (bytes), `audio_too_long` (seconds), `unsupported_audio` (shape)."""
