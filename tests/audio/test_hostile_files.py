"""Files made to hurt: whatever arrives, the answer is a Pcm or an AudioError, soon and in little memory."""

import contextlib
import io
import random
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio import AudioDecodeError, AudioError, AudioLimitError, AudioLimits
from audio.ffmpeg import CODEC_ERRORS, read_blocks
from tests.audio.signals import chirp, decode, encoded, silent_film, written

LIMITS = AudioLimits()
RNG = random.Random(20240715)

UNREADABLE = {
    "empty": (b"", "audio_empty"),
    "one-byte": (b"\xff", "unsupported_audio"),
    "zeros": (bytes(10_000), "unsupported_audio"),
    "random": (b"\x00" + RNG.randbytes(10_000), "unsupported_audio"),
    "html": (b"<!doctype html><title>404</title>", "unsupported_audio"),
    "json": (b'{"error": "not found"}', "unsupported_audio"),
    "raw-pcm": (bytes(range(256)) * 50, "unsupported_audio"),
    "ffconcat": (b"ffconcat version 1.0\nfile secret.wav\n", "unsupported_audio"),
    "hls": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/a.ts\n", "unsupported_audio"),
    "sdp": (b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\n", "unsupported_audio"),
    "avi": (b"RIFF\x00\x00\x00\x00AVI LIST", "unsupported_audio"),
    "bare-riff": (b"RIFF\x24\x00\x00\x00WAVE", "invalid_audio"),
    "bare-flac": (b"fLaC", "invalid_audio"),
    "bare-ogg": (b"OggS" + bytes(60), "invalid_audio"),
    "bare-mp4": (b"\x00\x00\x00\x18ftypisom" + bytes(16), "invalid_audio"),
    "bare-webm": (b"\x1a\x45\xdf\xa3" + bytes(60), "invalid_audio"),
    "id3-of-nothing": (b"ID3\x04\x00\x00\x00\x00\x00\x00" + bytes(500), "invalid_audio"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_not_audio_is_refused(name):
    data, code = UNREADABLE[name]
    error = refusal(data)
    assert error.code == code
    assert isinstance(error, AudioDecodeError)


@pytest.mark.parametrize("name", ["ffconcat", "hls", "sdp"])
@pytest.mark.parametrize("demuxers", ["wav", "mov,mp4,m4a,3gp,3g2,mj2", "concat,hls,sdp"])
def test_ffmpeg_itself_may_open_nothing_else(name, demuxers, tmp_path, monkeypatch):
    """Behind the sniffer stands a second wall, should a playlist ever get past the first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.wav").write_bytes(written(chirp(0.1, 16_000), 16_000, "WAV"))
    started = time.perf_counter()
    with pytest.raises(CODEC_ERRORS):
        list(read_blocks(io.BytesIO(UNREADABLE[name][0]), demuxers))
    assert time.perf_counter() - started < 20


def wav_header(rate=16_000, channels=1, bits=16, data_size=3_200, format_tag=1):
    frame = channels * bits // 8
    return b"".join(
        (
            b"RIFF" + struct.pack("<I", min(36 + data_size, 2**32 - 1)) + b"WAVEfmt " + struct.pack("<I", 16),
            struct.pack("<HHIIHH", format_tag, channels, rate, rate * frame & 0xFFFFFFFF, frame & 0xFFFF, bits),
            b"data" + struct.pack("<I", data_size),
        )
    )


@pytest.mark.parametrize(
    "header",
    [
        wav_header(channels=300),
        wav_header(channels=9),
        wav_header(channels=65_535),
        wav_header(channels=0),
        wav_header(rate=10_000_000),
        wav_header(rate=2**31 - 1),
        wav_header(rate=2**32 - 1),
        wav_header(rate=0),
        wav_header(rate=3_999),
        wav_header(bits=0),
        wav_header(data_size=0)[:30],
    ],
)
def test_headers_out_of_range_are_refused(header):
    assert refusal(header + bytes(24_000)).code in {"unsupported_audio", "invalid_audio"}


def test_size_in_the_header_is_not_believed():
    samples = RNG.randbytes(3_200)
    for claimed in (2**32 - 1, 2**31, 3_000_000):
        assert decode(wav_header(data_size=claimed) + samples, LIMITS).num_samples == 1_600


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_would_poison_the_spectrum_are_refused(value, channels):
    samples = chirp(0.2, 16_000, channels)
    samples[1_000, 0] = value
    assert refusal(written(samples, 16_000, "WAV", "FLOAT")).code == "invalid_audio"


def test_header_without_samples_is_empty():
    assert refusal(written(np.zeros((0, 1), np.float32), 16_000, "WAV")).code == "audio_empty"


def test_video_without_sound_has_no_audio_track():
    assert refusal(silent_film()).code == "unsupported_audio"


def test_length_limit_is_exact():
    limits = AudioLimits(max_clip_seconds=1.0)
    at_limit = written(np.zeros((44_100, 2), np.float32), 44_100, "WAV")
    assert decode(at_limit, limits).duration_s == 1.0
    over = refusal(written(np.zeros((44_101, 2), np.float32), 44_100, "WAV"), limits)
    assert (over.code, type(over)) == ("audio_too_long", AudioLimitError)
    assert "1 seconds" in over.message


def test_limits_on_bytes_and_on_decoded_bytes():
    wav = written(np.zeros((44_100, 2), np.float32), 44_100, "WAV")
    assert refusal(wav, AudioLimits(max_clip_bytes=len(wav) - 1)).code == "audio_too_large"
    assert refusal(wav, AudioLimits(max_decoded_bytes=100_000)).code == "audio_too_long"


def flac_of_silence(hours):
    file = io.BytesIO()
    block = np.zeros(1_000_000, np.int16)
    with soundfile.SoundFile(file, "w", 8_000, 1, format="FLAC", subtype="PCM_16") as flac:
        for _ in range(hours * 3600 * 8_000 // len(block)):
            flac.write(block)
    return file.getvalue()


def opus_of_silence(minutes):
    """As few bytes as they come."""
    file = io.BytesIO()
    minute = np.zeros(60 * 8_000, np.float32)
    with soundfile.SoundFile(file, "w", 8_000, 1, format="OGG", subtype="OPUS") as opus:
        for _ in range(minutes):
            opus.write(minute)
    return file.getvalue()


def test_minutes_of_opus_stop_at_the_limit():
    """CVE-2026-54233: Ogg says nothing of its length at the beginning, so the decoder has to count."""
    bomb = opus_of_silence(minutes=12)
    assert len(bomb) < 400_000
    growth_mib, seconds = cost_of_refusal(bomb, "audio_too_long")
    assert growth_mib < 100
    assert seconds < 10


def test_compressed_hours_stop_at_the_limit():
    bomb = flac_of_silence(hours=2)
    assert len(bomb) < 500_000
    unknown_length = bytearray(bomb)
    unknown_length[21] &= 0xF0  # the sample count of STREAMINFO: libsndfile gives up, FFmpeg streams
    unknown_length[22:26] = bytes(4)
    for data in (bomb, bytes(unknown_length)):
        growth_mib, seconds = cost_of_refusal(data, "audio_too_long")
        assert growth_mib < 100
        assert seconds < 5


def index_bomb():
    """FFmpeg would allocate 24 bytes for each sample this kilobyte claims: 24 GiB."""
    mp4 = bytearray(encoded(chirp(0.5, 48_000), 48_000, "mp4", "aac"))
    claimed = 2**30
    sizes, chunks, times = (mp4.index(tag) for tag in (b"stsz", b"stsc", b"stts"))
    mp4[sizes + 8 : sizes + 16] = struct.pack(">II", 1, claimed)
    mp4[chunks + 12 : chunks + 24] = struct.pack(">III", 1, claimed, 1)
    mp4[times + 8 : times + 20] = struct.pack(">III", 1, claimed, 1_024)
    return bytes(mp4)


def test_index_of_a_billion_samples_allocates_nothing_like_it():
    growth_mib, seconds = cost_of_refusal(index_bomb(), None)
    assert growth_mib < 100
    assert seconds < 5


def test_megabytes_of_broken_frames_are_given_up_soon():
    """Decoders look for the next good frame: what a fuzzer found slow, many times over."""
    good = written(chirp(0.25, 48_000, channels=2), 48_000, "MP3")
    for data in (
        (good[:417] + bytes(8)) * 40_000,
        good[:417] + RNG.randbytes(16 << 20),
        b"".join(b"\xff\xf1\x4c\x80\x2f\xff\xfc" + RNG.randbytes(370) for _ in range(40_000)),
    ):
        started = time.thread_time()
        with contextlib.suppress(AudioError):
            decode(data, AudioLimits())
        assert time.thread_time() - started < 5


def test_mutated_files_never_raise_anything_else():
    stereo = chirp(0.25, 48_000, channels=2)
    seeds = [
        written(stereo, 48_000, "WAV", "PCM_16"),
        written(stereo, 48_000, "FLAC"),
        written(stereo, 48_000, "OGG", "VORBIS"),
        written(stereo, 48_000, "OGG", "OPUS"),
        written(stereo, 48_000, "MP3"),
        written(stereo, 48_000, "AIFF"),
        encoded(stereo, 48_000, "mp4", "aac"),
        encoded(stereo, 48_000, "webm", "libopus"),
        encoded(stereo, 48_000, "adts", "aac"),
    ]
    num_refused = 0
    for seed in seeds:
        for round_index in range(23):
            data = mutated(seed, round_index)
            started = time.perf_counter()
            try:
                pcm = decode(data, LIMITS)
                assert np.isfinite(pcm.samples).all()
            except AudioError as error:
                num_refused += 1
                assert_safe(error)
            assert time.perf_counter() - started < 5
    assert num_refused > 10


def mutated(seed, round_index):
    data = bytearray(seed)
    if round_index % 4 == 0:
        return bytes(data[: RNG.randrange(1, len(data))])
    # Odd rounds keep to the headers, where lengths and counts are.
    window = min(len(data), 400) if round_index % 2 else len(data)
    for _ in range(RNG.choice((1, 4, 32))):
        data[RNG.randrange(window)] = RNG.choice((0, 0xFF, 0x7F, RNG.randrange(256)))
    return bytes(data)


def refusal(data, limits=LIMITS):
    with pytest.raises(AudioError) as caught:
        decode(data, limits)
    assert_safe(caught.value)
    return caught.value


def assert_safe(error):
    assert not re.search(r"0x[0-9a-f]|BytesIO|Errno|Traceback|\.py|avcodec|/tmp|/home", error.message)
    assert error.__cause__ is None


def cost_of_refusal(data, code):
    """(MiB by which resident memory peaked over its start, seconds)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, started = memory_mib("VmRSS"), time.perf_counter()
    error = refusal(data)
    if code is not None:
        assert error.code == code
    return memory_mib("VmHWM") - before, time.perf_counter() - started


def memory_mib(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
