"""Every format in, the same sound out; and parity with librosa, which the model's users load with."""

import io

import librosa
import numpy as np
import pytest

from audio import SAMPLE_RATE, AudioLimits
from tests.audio.signals import chirp, decode, encoded, written

LIMITS = AudioLimits()
SECONDS = 2.0

FILES = {
    "wav-16": lambda x, r: written(x, r, "WAV", "PCM_16"),
    "wav-24": lambda x, r: written(x, r, "WAV", "PCM_24"),
    "wav-u8": lambda x, r: written(x, r, "WAV", "PCM_U8"),
    "wav-float": lambda x, r: written(x, r, "WAV", "FLOAT"),
    "wav-mulaw": lambda x, r: written(x, r, "WAV", "ULAW"),
    "wav-adpcm": lambda x, r: written(x, r, "WAV", "MS_ADPCM"),
    "rf64": lambda x, r: written(x, r, "RF64", "PCM_16"),
    "flac": lambda x, r: written(x, r, "FLAC"),
    "ogg-vorbis": lambda x, r: written(x, r, "OGG", "VORBIS"),
    "ogg-opus": lambda x, r: written(x, r, "OGG", "OPUS"),
    "mp3": lambda x, r: written(x, r, "MP3"),
    "aiff": lambda x, r: written(x, r, "AIFF", "PCM_16"),
    "au": lambda x, r: written(x, r, "AU", "PCM_16"),
    "caf": lambda x, r: written(x, r, "CAF", "PCM_16"),
    "m4a": lambda x, r: encoded(x, r, "mp4", "aac"),
    "m4a-alac": lambda x, r: encoded(x, r, "mp4", "alac"),
    "aac-adts": lambda x, r: encoded(x, r, "adts", "aac"),
    "webm-opus": lambda x, r: encoded(x, r, "webm", "libopus"),
    "matroska-flac": lambda x, r: encoded(x, r, "matroska", "flac"),
    "mp4-video": lambda x, r: encoded(x, r, "mp4", "aac", has_video=True),
}
LOSSLESS = {"wav-16", "wav-24", "wav-float", "rf64", "flac", "aiff", "au", "caf"}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_source_back(name):
    source = chirp(SECONDS, 48_000, channels=2)
    pcm = decode(FILES[name](source, 48_000), LIMITS)
    expected = soxr_reference(source, 48_000)

    assert pcm.duration_s == pytest.approx(SECONDS, abs=0.08)
    assert np.linalg.norm(pcm.samples) == pytest.approx(np.linalg.norm(expected), rel=0.05)
    assert best_correlation(pcm.samples, expected) > 0.98
    if name in LOSSLESS:
        assert np.abs(pcm.samples - expected).max() < 1e-3


@pytest.mark.parametrize(
    ("container", "codec", "rate"), [("amr", "libopencore_amrnb", 8_000), ("asf", "wmav2", 44_100)]
)
def test_codecs_with_rates_of_their_own(container, codec, rate):
    source = chirp(SECONDS, rate)
    pcm = decode(encoded(source, rate, container, codec), LIMITS)
    assert pcm.duration_s == pytest.approx(SECONDS, abs=0.1)
    assert best_correlation(pcm.samples, soxr_reference(source, rate)) > 0.9


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # librosa's own imports
@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000, 16_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_parity_with_librosa(rate, channels):
    # An odd length: soxr alone comes out one sample short of librosa for some of these.
    data = written(chirp(1.7312, rate, channels), rate, "WAV", "PCM_16")
    expected, _ = librosa.load(io.BytesIO(data), sr=SAMPLE_RATE)
    pcm = decode(data, LIMITS)
    assert pcm.num_samples == len(expected)
    assert np.abs(pcm.samples - expected).max() <= 1e-4


@pytest.mark.parametrize("num_frames", [1, 2, 3, 440, 441, 442, 65_535, 65_536, 65_537, 132_301])
def test_length_is_the_ceiling_of_the_exact_ratio(num_frames):
    data = written(np.full((num_frames, 1), 0.25, np.float32), 44_100, "WAV", "FLOAT")
    assert decode(data, LIMITS).num_samples == -(-num_frames * 16_000 // 44_100)


def test_stereo_is_mixed_by_the_exact_mean():
    stereo = chirp(0.5, SAMPLE_RATE, channels=2)
    pcm = decode(written(stereo, SAMPLE_RATE, "WAV", "FLOAT"), LIMITS)
    assert np.array_equal(pcm.samples, (stereo[:, 0] + stereo[:, 1]) * np.float32(0.5))


def test_ffmpeg_route_mixes_at_the_same_level():
    left = chirp(1.0, 48_000)
    both = np.concatenate([left, left], axis=1)  # ffmpeg's own downmix would be 3 dB louder
    pcm = decode(encoded(both, 48_000, "matroska", "flac"), LIMITS)
    assert np.abs(pcm.samples - soxr_reference(left, 48_000)).max() < 1e-3


def test_sixteen_kilohertz_passes_through_untouched():
    mono = chirp(5.0, SAMPLE_RATE)
    assert np.array_equal(decode(written(mono, SAMPLE_RATE, "WAV", "FLOAT"), LIMITS).samples, mono[:, 0])


def test_equal_sound_has_equal_identity_whatever_the_file():
    samples = (chirp(0.3, SAMPLE_RATE) * 32_767).astype(np.int16)
    wav, flac = (written(samples, SAMPLE_RATE, name, "PCM_16") for name in ("WAV", "FLAC"))
    assert decode(wav, LIMITS) == decode(flac, LIMITS)
    assert decode(wav, LIMITS) != decode(written(samples // 2, SAMPLE_RATE, "WAV", "PCM_16"), LIMITS)


def test_flac_of_unknown_length_falls_back_to_ffmpeg():
    flac = bytearray(written(chirp(1.0, SAMPLE_RATE), SAMPLE_RATE, "FLAC"))
    flac[21] &= 0xF0  # the 36-bit sample count of STREAMINFO: zero means unknown
    flac[22:26] = bytes(4)
    assert decode(bytes(flac), LIMITS).duration_s == pytest.approx(1.0)


def test_wav_of_unknown_length_is_read_to_its_end():
    wav = bytearray(written(chirp(1.0, SAMPLE_RATE), SAMPLE_RATE, "WAV", "PCM_16"))
    wav[4:8] = wav[40:44] = b"\xff" * 4
    assert decode(bytes(wav), LIMITS).duration_s == pytest.approx(1.0, abs=0.01)


def soxr_reference(samples, rate):
    mono = samples.mean(axis=1)
    return librosa.resample(mono, orig_sr=rate, target_sr=SAMPLE_RATE, res_type="soxr_hq")


def best_correlation(heard, source):
    """Highest correlation coefficient over whole-signal shifts: a codec may delay, not distort."""
    size = len(heard) + len(source)
    products = np.fft.irfft(np.fft.rfft(heard, size) * np.fft.rfft(source, size).conj(), size)
    return products.max() / (np.linalg.norm(heard) * np.linalg.norm(source))
