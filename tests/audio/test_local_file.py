"""file: URLs: one folder, regular files, no way out of it, and no telling what lies outside."""

import asyncio
import os
import time

import pytest

from audio import AudioError, AudioLimits, AudioLoader, AudioUrl
from audio.local_file import LocalFiles
from tests.audio.signals import chirp, decode, written

LIMITS = AudioLimits(max_clip_bytes=100_000)
WAV = written(chirp(0.2, 16_000), 16_000, "WAV", "PCM_16")
REFUSED = "The file: URL names no file that this server may read."


@pytest.fixture
def folder(tmp_path):
    """A folder with a file, and everything that might lead out of it."""
    inside, outside = tmp_path / "media", tmp_path / "media2"
    (inside / "sub dir").mkdir(parents=True)
    outside.mkdir()
    for path in (inside / "a.wav", inside / "sub dir" / "b.wav", outside / "secret.wav"):
        path.write_bytes(WAV)
    (inside / "within").symlink_to(inside / "a.wav")
    (inside / "out").symlink_to(outside / "secret.wav")
    (inside / "door").symlink_to(outside)
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "null").symlink_to(os.devnull)
    os.mkfifo(inside / "pipe")
    return inside


def read(folder, url):
    with LocalFiles(folder, LIMITS).open(url.replace("FOLDER", str(folder))) as file:
        return file.read()


@pytest.mark.parametrize(
    "url",
    [
        "file://FOLDER/a.wav",
        "FILE://localhostFOLDER/a.wav",
        "file:FOLDER/a.wav",
        "file://FOLDER/sub%20dir/b.wav",
        "file://FOLDER/sub dir/../a.wav",
        "file://FOLDER/within",
        "file://FOLDER/a.wav?query#fragment",
    ],
)
def test_files_in_the_folder(folder, url):
    assert read(folder, url) == WAV


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file://FOLDER/../media2/secret.wav",
        "file://FOLDER/%2e%2e/media2/secret.wav",
        "file://FOLDER/..%2fmedia2/secret.wav",
        "file://FOLDER2/secret.wav",
        "file://FOLDER/out",
        "file://FOLDER/door/secret.wav",
        "file://FOLDER/loop",
        "file://FOLDER/null",
        "file://FOLDER/pipe",
        "file://FOLDER/missing.wav",
        "file://FOLDER/a.wav/more",
        "file://FOLDER",
        "file://FOLDER/",
        "file://FOLDER/sub dir",
        "file:///dev/zero",
        "file:///proc/self/environ",
        "file://FOLDER/" + "a" * 300,
    ],
)
def test_all_else_is_refused_alike_and_at_once(folder, url):
    started = time.monotonic()
    with pytest.raises(AudioError) as caught:
        read(folder, url)
    assert time.monotonic() - started < 5
    assert (caught.value.code, caught.value.message) == ("media_url_refused", REFUSED)


@pytest.mark.parametrize(
    "url",
    [
        "file://evil.testFOLDER/a.wav",
        "file://FOLDER/a.wav%00.mp3",
        "file:a.wav",
        "file:",
        "file://[/a",
        "file:" + "/a" * 9_000,
    ],
)
def test_malformed_ones(folder, url):
    with pytest.raises(AudioError) as caught:
        read(folder, url)
    assert caught.value.code == "invalid_audio_url"


def test_size_is_checked_before_reading(folder):
    (folder / "big").write_bytes(bytes(100_001))
    with pytest.raises(AudioError) as caught:
        read(folder, "file://FOLDER/big")
    assert caught.value.code == "audio_too_large"


def test_a_folder_that_is_a_link_itself_may_be_named(folder, tmp_path):
    (tmp_path / "alias").symlink_to(folder)
    files = LocalFiles(tmp_path / "alias", LIMITS)
    with files.open(f"file://{tmp_path}/alias/a.wav") as file:
        assert file.read() == WAV


def test_no_descriptor_is_left_open(folder):
    before = len(os.listdir("/proc/self/fd"))
    for name in ("a.wav", "out", "missing", "pipe", "sub dir", "door/secret.wav"):
        try:
            read(folder, f"file://FOLDER/{name}")
        except AudioError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_through_the_loader_and_off_by_default(folder):
    async def scenario(**options):
        loader = AudioLoader(LIMITS, **options)
        try:
            return await loader.load(AudioUrl(f"file://{folder}/a.wav"))
        finally:
            await loader.aclose()

    assert asyncio.run(scenario(local_files=LocalFiles(folder, LIMITS))) == decode(WAV, LIMITS)
    with pytest.raises(AudioError) as caught:
        asyncio.run(scenario())
    assert caught.value.code == "media_url_refused"
    assert "file:" in caught.value.message
