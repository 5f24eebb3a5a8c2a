"""Decoders that crash, hang, starve and are killed: one request pays, nobody else notices, nothing is left."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from audio import AudioError, AudioLimits, DecoderLimits
from audio.decoder_pool import DecoderPool
from tests.audio.signals import chirp, decode, written

LIMITS = AudioLimits()
ROOT = Path(__file__).parent.parent.parent
WAV = written(chirp(0.5, 16_000), 16_000, "WAV", "PCM_16")
BROKEN = b"fLaC" + bytes(1_000)


@pytest.fixture
def pool():
    decoders = DecoderPool(LIMITS)
    yield decoders
    decoders.close()
    assert not processes()


def processes():
    """The host of the decoders and all decoders, of this test process."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE and "audio.decoder_process" in process.cmdline()
    ]


def decoders():
    return [process for process in processes() if process.parent().pid != os.getpid()]


def host():
    [found] = [process for process in processes() if process.parent().pid == os.getpid()]
    return found


def refusal(call):
    with pytest.raises(AudioError) as caught:
        call()
    return caught.value.code


def long_flac(minutes):
    return written(np.tile(chirp(1, 16_000), (60 * minutes, 1)), 16_000, "FLAC")


def test_samples_come_back_as_they_were_decoded(pool):
    samples = pool.decode(io.BytesIO(WAV))
    assert samples.tobytes() == decode(WAV, LIMITS).samples.tobytes()
    assert not samples.flags.writeable
    minutes = written(np.tile(chirp(10, 16_000), (30, 1)), 16_000, "WAV", "FLOAT")  # many frames' worth
    assert pool.decode(io.BytesIO(minutes)).tobytes() == decode(minutes, LIMITS).samples.tobytes()


def test_a_decoder_is_kept_until_it_meets_a_bad_file(pool):
    pool.decode(io.BytesIO(WAV))
    [first] = decoders()
    pool.decode(io.BytesIO(WAV))
    assert decoders() == [first]
    assert refusal(lambda: pool.decode(io.BytesIO(BROKEN))) == "invalid_audio"
    assert decoders() == []
    assert len(pool.decode(io.BytesIO(WAV))) == 8_000
    assert refusal(lambda: pool.decode(io.BytesIO(b""))) == "audio_empty"
    assert refusal(lambda: pool.decode(io.BytesIO(b"<html>"))) == "unsupported_audio"


def test_a_decoder_that_another_file_broke_is_not_this_files_fault(pool, caplog):
    pool.decode(io.BytesIO(WAV))
    [decoder] = decoders()
    decoder.suspend()
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(pool.decode, io.BytesIO(WAV))
        while not pool_is_busy(pool):
            time.sleep(0.01)
        decoder.send_signal(signal.SIGSEGV)
        decoder.resume()
        assert len(reading.result(10)) == 8_000
    assert "SIGSEGV" in caplog.text


def pool_is_busy(pool):
    return not pool._idle


def test_a_decoder_that_died_while_idle_is_passed_over(pool):
    pool.start(2)
    victims = decoders()
    for process in victims:
        process.send_signal(signal.SIGSEGV)
    deadline = time.monotonic() + 20
    while any(process.status() != psutil.STATUS_ZOMBIE for process in victims):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(pool.decode(io.BytesIO(WAV))) == 8_000


def test_over_its_processor_time_a_decoder_ends(caplog):
    pool = DecoderPool(LIMITS, DecoderLimits(cpu_s=0.05))
    try:
        started = time.monotonic()
        assert refusal(lambda: pool.decode(io.BytesIO(long_flac(9)))) == "invalid_audio"
        assert time.monotonic() - started < 10
        assert "SIGPROF" in caplog.text
        assert len(pool.decode(io.BytesIO(WAV))) == 8_000
    finally:
        pool.close()


def test_a_decoder_that_hangs_is_not_waited_for():
    pool = DecoderPool(LIMITS, DecoderLimits(wall_s=0.3))
    try:
        pool.start(2)
        stuck, _ = decoders()
        for process in decoders():
            process.suspend()
        started = time.monotonic()
        with ThreadPoolExecutor(2) as threads:
            codes = list(threads.map(lambda _: refusal(lambda: pool.decode(io.BytesIO(WAV))), range(2)))
        assert codes == ["invalid_audio"] * 2
        assert time.monotonic() - started < 10
        assert not stuck.is_running()
        assert len(pool.decode(io.BytesIO(WAV))) == 8_000
    finally:
        pool.close()


def test_memory_is_bounded():
    wide = written(np.zeros((60_000, 8), np.float32), 16_000, "WAV", "FLOAT")  # read in blocks of 2 MiB
    limits = AudioLimits(max_clip_seconds=4)
    pool, roomy = (DecoderPool(limits, DecoderLimits(memory_bytes=size)) for size in (100_000, 64 << 20))
    try:
        assert len(roomy.decode(io.BytesIO(wide))) == 60_000
        assert refusal(lambda: pool.decode(io.BytesIO(wide))) == "invalid_audio"
    finally:
        pool.close()
        roomy.close()


def test_many_at_once_and_some_of_them_bad(pool):
    """Who shares a decoder with a bad file, before or after it, gets what he would have got alone."""
    with ThreadPoolExecutor(4) as threads:
        good = [threads.submit(pool.decode, io.BytesIO(WAV)) for _ in range(20)]
        bad = [threads.submit(refusal, lambda: pool.decode(io.BytesIO(BROKEN))) for _ in range(10)]
        good += [threads.submit(pool.decode, io.BytesIO(WAV)) for _ in range(20)]
        for _ in range(5):
            for process in decoders():
                process.kill()
            time.sleep(0.01)
        assert {future.result() for future in bad} == {"invalid_audio"}
    outcomes = [future.exception() for future in good]
    # A kill is not a codec's death: it counts against the file that was being read.
    assert sum(outcome is None for outcome in outcomes) >= len(good) - 20
    assert all(outcome is None or isinstance(outcome, AudioError) for outcome in outcomes)


def test_windows_hold_still_between_requests(pool):
    sound = chirp(7.3, 16_000)
    windows = pool.windows(io.BytesIO(written(sound, 16_000, "WAV", "FLOAT")), LIMITS, 32_000)
    first = next(windows)
    [decoder] = decoders()
    before = decoder.cpu_times()
    time.sleep(0.1)
    assert decoder.cpu_times() == before
    heard = np.concatenate([first, *windows])
    assert heard.tobytes() == sound[:, 0].tobytes()
    assert decoders() == []


def test_a_long_file_goes_over_as_a_descriptor_and_leaves_with_its_reader(pool):
    with tempfile.TemporaryFile() as file:
        file.write(long_flac(9) + bytes(1 << 20))
        windows = pool.windows(file, LIMITS, 480_000)
        assert len(next(windows)) <= 480_000
        assert len(decoders()) == 1
        windows.close()
    assert decoders() == []


def test_a_long_file_whose_decoder_dies(pool):
    windows = pool.windows(io.BytesIO(long_flac(9)), LIMITS, 480_000)
    next(windows)
    decoders()[0].send_signal(signal.SIGSEGV)
    assert refusal(lambda: next(windows)) == "invalid_audio"
    assert len(pool.decode(io.BytesIO(WAV))) == 8_000


def test_a_host_that_was_killed_is_started_again(pool):
    pool.decode(io.BytesIO(WAV))
    windows = pool.windows(io.BytesIO(WAV), LIMITS, 16_000)
    started = processes()
    host().kill()
    assert len(pool.decode(io.BytesIO(WAV))) == 8_000
    assert refusal(lambda: pool.decode(io.BytesIO(BROKEN))) == "invalid_audio"
    assert [len(window) for window in windows] == [8_000]
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive


def test_decoders_have_nothing_and_may_do_nothing(pool, monkeypatch):
    monkeypatch.setenv("TYMPAN_API_KEY", "secret")
    pool.decode(io.BytesIO(WAV))
    [decoder] = decoders()
    assert decoder.cwd() == "/"
    folder = Path(f"/proc/{decoder.pid}")
    assert b"secret" not in (folder / "environ").read_bytes()
    pool.decode(io.BytesIO(WAV))
    time.sleep(0.1)  # it closes the file once its samples are sent
    assert sorted(int(path.name) for path in (folder / "fd").iterdir()) == [0, 1, 2, 3]
    assert {os.readlink(folder / "fd" / str(number)) for number in range(3)} == {os.devnull}
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (folder / "limits").read_text().splitlines()}
    for name, value in {"file size": "0", "core file size": "0", "processes": "0", "open files": "5"}.items():
        assert limits[f"Max {name}"] == [value] * 2
    assert int(limits["Max address space"][0]) < 2 << 30


def test_what_is_left_to_code_that_takes_a_decoder_over():
    """The limits themselves, with the descriptors of a job under way."""
    script = """
    import os, socket
    from audio.decoder_process import _bound
    file = os.memfd_create("audio")
    while os.dup(file) < 4: pass
    _bound(64 << 20)
    def try_(what):
        try: what()
        except (OSError, MemoryError) as error: return type(error).__name__
        return "done"
    print(try_(lambda: open("/etc/passwd")), try_(socket.socket), try_(lambda: os.write(file, b"x")),
          try_(lambda: bytearray(1 << 28)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["OSError", "OSError", "OSError", "MemoryError"]


def test_all_of_them_end_with_a_server_that_is_killed():
    script = """
    import io, sys
    from audio import AudioLimits
    from audio.decoder_pool import DecoderPool
    pool = DecoderPool(AudioLimits())
    pool.start(2)
    windows = pool.windows(io.BytesIO(open(sys.argv[1], "rb").read()), AudioLimits(), 16_000)
    next(windows)
    print("ready", flush=True)
    sys.stdin.read()
    """
    with (
        tempfile.NamedTemporaryFile() as file,
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), file.name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as server,
    ):
        file.write(long_flac(1))
        file.flush()
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        started = psutil.Process(server.pid).children(recursive=True)
        assert len(started) == 4
        server.kill()
        _, alive = psutil.wait_procs(started, timeout=10)
        assert alive == []


def test_the_http_process_loads_no_codec():
    script = "import sys, server.__main__; print({'av', 'soundfile', 'soxr'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
