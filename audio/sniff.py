"""Which decoder a file's first bytes ask for.

The bytes decide, never a declared format or content type: clients get those wrong, and a guessing
decoder given free choice reads playlists and noise. Each container names the only FFmpeg demuxers that
may open it, so a file cannot announce one format and be parsed as another. Headerless PCM is not
recognised: libsndfile would play it as MP3 noise.
"""

from dataclasses import dataclass

SUPPORTED_FORMATS = (
    "WAV, FLAC, MP3, Ogg (Opus, Vorbis, FLAC, Speex), M4A/MP4/AAC, WebM/Matroska, AIFF, AU, CAF, AMR and WMA"
)

_ASF_GUID = bytes.fromhex("3026b2758e66cf11")
_EBML_MAGIC = b"\x1a\x45\xdf\xa3"
_OGG_CODEC_WINDOW = 64  # bytes; the first page's header is 28 and the codec's name follows
NUM_SNIFFED_BYTES = _OGG_CODEC_WINDOW


@dataclass(frozen=True, slots=True)
class Container:
    """`demuxers` is FFmpeg's own short names, comma separated. libsndfile, where used, is tried first."""

    demuxers: str
    is_soundfile_first: bool = False


_WAV = Container("wav", is_soundfile_first=True)
_AIFF = Container("aiff", is_soundfile_first=True)
_FLAC = Container("flac", is_soundfile_first=True)
_AU = Container("au", is_soundfile_first=True)
_CAF = Container("caf", is_soundfile_first=True)
_MP3 = Container("mp3", is_soundfile_first=True)
_TAGGED = Container("mp3,aac,flac", is_soundfile_first=True)  # an ID3 tag may precede any of them
_OGG = Container("ogg")  # Opus included: libsndfile takes more than twice FFmpeg's time for it
_OGG_VORBIS = Container("ogg", is_soundfile_first=True)
_AAC = Container("aac")
_MATROSKA = Container("matroska,webm")
_MP4 = Container("mov,mp4,m4a,3gp,3g2,mj2")
_AMR = Container("amr")
_ASF = Container("asf")

_BY_PREFIX = {
    b"fLaC": _FLAC,
    b".snd": _AU,
    b"caff": _CAF,
    b"ID3": _TAGGED,
    b"#!AMR": _AMR,
    _EBML_MAGIC: _MATROSKA,
    _ASF_GUID: _ASF,
}


def container_name(data: bytes) -> str:
    """A word for what `data` opens with, from a list of a dozen; `unknown` for all else."""
    container = sniff(data[:NUM_SNIFFED_BYTES])
    return container.demuxers.split(",")[0] if container else "unknown"


def sniff(data: bytes) -> Container | None:
    """The container that `data` opens with, or None when it is none that this server reads."""
    if data[:4] in (b"RIFF", b"RIFX", b"RF64") and data[8:12] == b"WAVE":
        return _WAV
    if data[:4] == b"FORM" and data[8:11] == b"AIF":
        return _AIFF
    if data[:4] == b"OggS":
        return _OGG_VORBIS if b"vorbis" in data[:_OGG_CODEC_WINDOW] else _OGG
    if data[4:8] == b"ftyp":
        return _MP4
    for prefix, container in _BY_PREFIX.items():
        if data.startswith(prefix):
            return container
    return _sniff_mpeg_frame(data)


def _sniff_mpeg_frame(data: bytes) -> Container | None:
    if len(data) < 2 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return None
    if data[1] & 0x06:  # layer bits: 0 is reserved in MPEG audio, and always 0 in ADTS
        return _MP3
    return _AAC if data[1] & 0xF0 == 0xF0 else None
