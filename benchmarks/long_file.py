"""A long recording of known words through /v1/audio/transcriptions, on a server that this script starts.

    python -m benchmarks.long_file --minutes 10 --window-seconds 5

The recording is the test fixtures' speech in random order with random pauses. Speed: one request for the whole file
against the same windows sent one at a time, in one run. Seams: word error with cuts at quiet points, with naive cuts
every so many seconds, and of the utterances alone, which is what the model itself gets wrong. The samples of the
runs differ by a gain of 1 %, so that no run finds the clips of another in the encoder's cache.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile
from numpy.typing import NDArray

from audio import SAMPLE_RATE, segment
from benchmarks.report import finish

SPEECH = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "speech"
MIN_SAMPLES = 1600

Samples = NDArray[np.float32]


def utterances() -> list[tuple[Samples, str]]:
    """The fixtures that are speech, with their words."""
    known = json.loads((SPEECH / "transcripts.json").read_text(encoding="utf-8"))
    return [
        (soundfile.read(SPEECH / name, dtype="float32")[0], entry["text"])
        for name, entry in known.items()
        if entry["text"]
    ]


def make_recording(minutes: float, seed: int) -> tuple[Samples, list[str]]:
    """So much speech, and its words."""
    generator = np.random.default_rng(seed)
    spoken = utterances()
    pieces: list[Samples] = []
    words: list[str] = []
    num_samples = 0
    while num_samples < minutes * 60 * SAMPLE_RATE:
        samples, text = spoken[generator.integers(len(spoken))]
        pause = np.zeros(int(generator.uniform(0.3, 0.9) * SAMPLE_RATE), np.float32)
        pieces += [samples, pause]
        words += text.split()
        num_samples += len(samples) + len(pause)
    sound = np.concatenate(pieces)
    return sound + generator.normal(0, 1e-4, len(sound)).astype(np.float32), words


def wav(samples: Samples, gain: float) -> bytes:
    """16-bit WAV."""
    file = io.BytesIO()
    soundfile.write(file, samples * gain, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[httpx.Client]:
    """A server of our own, ended at the end. -> a client of it."""
    command = [sys.executable, "-m", "server", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        line = ""
        while not (address := re.search(r"^Tympan serves .*(http://\S+)", line)):
            line = next(process.stdout)
        threading.Thread(target=process.stdout.read, daemon=True).start()
        with httpx.Client(base_url=address[1], timeout=3600, trust_env=False) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def transcribe(client: httpx.Client, data: bytes) -> str:
    """One request."""
    response = client.post("/v1/audio/transcriptions", files={"file": ("a.wav", data, "audio/wav")})
    response.raise_for_status()
    return str(response.json()["text"])


def first_delta_s(client: httpx.Client, data: bytes) -> float:
    """Seconds till a stream's first text; the rest is not waited for."""
    started = time.perf_counter()
    files = {"file": ("a.wav", data, "audio/wav")}
    with client.stream("POST", "/v1/audio/transcriptions", data={"stream": "true"}, files=files) as response:
        next(line for line in response.iter_lines() if "transcript.text.delta" in line)
        return time.perf_counter() - started


def word_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest words to insert, delete or replace."""
    ids = {word: number for number, word in enumerate({*said, *heard})}
    wanted = np.array([ids[word] for word in said])
    steps = np.arange(len(said) + 1)
    row = steps
    for word in heard:
        best = np.minimum(row + 1, np.concatenate(([len(heard) + len(said)], row[:-1] + (wanted != ids[word]))))
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All runs on one server."""
    sound, words = make_recording(args.minutes, args.seed)
    max_samples = int(args.window_seconds * SAMPLE_RATE)
    quiet = list(segment([sound], max_samples))
    starts = range(0, len(sound) - MIN_SAMPLES, max_samples)  # the recording ends with a pause
    naive = [sound[start : start + max_samples] for start in starts]
    arguments = ["--transcription-window-seconds", str(args.window_seconds), "--dtype", args.dtype]
    with serving(arguments) as client:
        for part in quiet[:4]:
            transcribe(client, wav(part, 0.9))  # warm-up
        started = time.perf_counter()
        one_at_a_time = [transcribe(client, wav(part, 1.0)) for part in quiet]
        serial_s = time.perf_counter() - started
        started = time.perf_counter()
        whole = transcribe(client, wav(sound, 0.99))
        whole_s = time.perf_counter() - started
        with ThreadPoolExecutor(16) as pool:
            cut_naively = list(pool.map(lambda part: transcribe(client, wav(part, 0.98)), naive))
        alone = [(text.split(), transcribe(client, wav(samples, 0.97)).split()) for samples, text in utterances()]
        first_s = first_delta_s(client, wav(sound, 0.96))
    texts = {"quiet_cuts": whole, "one_at_a_time": " ".join(one_at_a_time), "naive_cuts": " ".join(cut_naively)}
    errors = {name: word_errors(words, text.split()) for name, text in texts.items()}
    num_alone = sum(len(said) for said, _ in alone)
    return {
        "benchmark": "long_file",
        "minutes": len(sound) / SAMPLE_RATE / 60,
        "window_seconds": args.window_seconds,
        "dtype": args.dtype,
        "windows": len(quiet),
        "words": len(words),
        "one_at_a_time_s": serial_s,
        "whole_file_s": whole_s,
        "speedup": serial_s / whole_s,
        "first_text_s": first_s,
        "word_error_rate": {
            **{name: count / len(words) for name, count in errors.items()},
            "utterances_alone": sum(word_errors(said, heard) for said, heard in alone) / num_alone,
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--window-seconds", type=float, default=5)
    parser.add_argument("--dtype", default="float32", help="of the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    finish(measure(args), args.output)


if __name__ == "__main__":
    main()
