"""Looks for what hostile bytes and references do to the audio package: crashes, stalls, errors of other kinds.

`files` mutates small files of all containers, from a seed, and sends them through the decoders as a server does. A
file that ends a decoder, takes over a second twice or raises anything but an AudioError is a finding. `references`
lets atheris (`pip install --group fuzz`; it follows Python code) write base64, data: URLs and links. Findings are
written to `--findings`; each belongs into tests/audio/test_hostile_files.py or test_source.py with its fix.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import logging
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

try:
    import atheris
except ImportError:  # it is needed for one mode only, and has no wheel for every Python
    atheris = None

import audio.media_url
import audio.source
import audio.text_file
from audio import AudioError, AudioLimits, FetchPolicy, FiledText, TextFile
from audio.decoder_pool import DecoderPool
from benchmarks.report import finish
from tests.audio.signals import chirp, encoded, written

SLOW_S = 1.0
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
MAX_INLINE_S = 0.5


def seeds() -> dict[str, bytes]:
    """Small real files, one of each container and codec that is read."""
    stereo, narrow = chirp(0.25, 48_000, channels=2), chirp(0.25, 8_000)
    by_libsndfile = {
        "wav-16": ("WAV", "PCM_16"),
        "wav-adpcm": ("WAV", "MS_ADPCM"),
        "wav-ima": ("WAV", "IMA_ADPCM"),
        "wavex": ("WAVEX", "PCM_24"),
        "rf64": ("RF64", "PCM_16"),
        "flac": ("FLAC", "PCM_16"),
        "ogg-vorbis": ("OGG", "VORBIS"),
        "ogg-opus": ("OGG", "OPUS"),
        "mp3": ("MP3", None),
        "aiff": ("AIFF", "PCM_16"),
        "au": ("AU", "ULAW"),
        "caf": ("CAF", "ALAC_16"),
    }
    by_ffmpeg = {
        "m4a-aac": ("mp4", "aac"),
        "m4a-alac": ("mp4", "alac"),
        "adts": ("adts", "aac"),
        "webm-opus": ("webm", "libopus"),
        "matroska-flac": ("matroska", "flac"),
        "ogg-flac": ("ogg", "flac"),
        "asf": ("asf", "wmav2"),
    }
    files = {name: written(stereo, 48_000, *how) for name, how in by_libsndfile.items()}
    files |= {name: encoded(stereo, 48_000, *how) for name, how in by_ffmpeg.items()}
    files["wav-gsm"] = written(narrow, 8_000, "WAV", "GSM610")
    files["amr"] = encoded(narrow, 8_000, "amr", "libopencore_amrnb")
    files["mp4-video"] = encoded(stereo, 48_000, "mp4", "aac", has_video=True)
    return files


def mutated(source: random.Random, corpus: list[bytes]) -> bytes:
    """A file with a few bytes, numbers, runs or its end changed, or spliced with another one."""
    data = bytearray(source.choice(corpus))
    for _ in range(source.choice((1, 2, 4, 16))):
        # Half of all changes keep to the headers, where lengths and counts are.
        window = min(len(data), 300) if source.random() < 0.5 else len(data)
        at = source.randrange(max(1, window))
        match source.randrange(7):
            case 0:
                data[at : at + 1] = bytes([source.choice((*INTERESTING, source.randrange(256)))])
            case 1:
                number = source.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, source.getrandbits(32)))
                data[at : at + 4] = number.to_bytes(4, source.choice(("big", "little")))
            case 2:
                data[at : at + source.randrange(1, 64)] = b""
            case 3:
                run = data[at : at + source.randrange(1, 256)]
                data[at:at] = run * source.choice((1, 2, 50))
            case 4:
                data[at:] = data[at : at + len(data) // 2]
            case 5:
                other = source.choice(corpus)
                data[at:] = other[source.randrange(len(other)) :]
            case _:
                data[at : at + 1] = bytes([data[at] ^ 1 << source.randrange(8)]) if at < len(data) else b""
    return bytes(data)


class Deaths(logging.Handler):
    """Counts the decoders that did not end by our hand."""

    def __init__(self) -> None:
        super().__init__()
        self.signals: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """One of them."""
        self.signals[str(record.args[0] if isinstance(record.args, tuple) else record.args)] += 1


def files(args: argparse.Namespace) -> dict[str, Any]:
    """The first mode."""
    logger, deaths = logging.getLogger("audio.decoder_pool"), Deaths()
    logger.addHandler(deaths)
    logger.propagate = False
    source = random.Random(args.seed)
    corpus = list(seeds().values())
    pool = DecoderPool(AudioLimits())
    outcomes: Counter[str] = Counter()
    worst_s, num_findings = 0.0, 0
    ends = time.monotonic() + args.seconds
    try:
        while time.monotonic() < ends:
            data = mutated(source, corpus)
            num_deaths = deaths.signals.total()
            outcome, took = timed(pool, data)
            if took > SLOW_S:  # the machine may have been busy: what is slow is so again
                took = min(took, timed(pool, data)[1])
            outcomes[outcome] += 1
            worst_s = max(worst_s, took)
            if took > SLOW_S or deaths.signals.total() > num_deaths or outcome.startswith("raised"):
                num_findings += 1
                keep(args.findings, f"{args.seed}-{sum(outcomes.values())}", data)
    finally:
        pool.close()
    return {
        "seed": args.seed,
        "seconds": args.seconds,
        "num_files": sum(outcomes.values()),
        "outcomes": dict(outcomes.most_common()),
        "deaths": dict(deaths.signals),
        "worst_s": worst_s,
        "num_findings": num_findings,
    }


def timed(pool: DecoderPool, data: bytes) -> tuple[str, float]:
    """-> what became of a file, and the seconds that it took."""
    started = time.monotonic()
    outcome = outcome_of(lambda: pool.decode(io.BytesIO(data)))
    return outcome, time.monotonic() - started


def outcome_of(decode: Callable[[], np.ndarray[Any, Any]]) -> str:
    """`decoded`, the code of a refusal, or what else was raised."""
    try:
        samples = decode()
    except AudioError as error:
        return error.code
    except Exception as error:
        return f"raised {type(error).__name__}"
    return "decoded" if np.isfinite(samples).all() else "raised nothing for samples that are not finite"


def keep(folder: Path, name: str, data: bytes) -> None:
    """A finding."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def references(args: argparse.Namespace) -> dict[str, Any]:
    """The second mode. A finding ends it, and is in a file of `--findings`."""
    if atheris is None:
        raise SystemExit("this mode needs atheris: pip install --group fuzz")
    args.findings.mkdir(parents=True, exist_ok=True)
    log = args.findings / "references.log"
    child = multiprocessing.get_context("fork").Process(target=fuzz_references, args=(args, log))
    child.start()  # libFuzzer ends its process itself, at the end as at a finding
    child.join()
    said = log.read_text(errors="replace")
    return {
        "seed": args.seed,
        "seconds": args.seconds,
        "atheris": importlib.metadata.version("atheris"),
        **{name: int(number) for name, number in re.findall(r"^stat::(\w+):\s+(\d+)$", said, re.MULTILINE)},
        "num_findings": int(child.exitcode != 0),
    }


def fuzz_references(args: argparse.Namespace, log: Path) -> None:
    """Never returns: atheris writes texts until its time is up."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    limits, policy = AudioLimits(max_clip_bytes=4096), FetchPolicy()

    def one(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        reads: tuple[Callable[[], object], ...] = (
            lambda: audio.source.write_inline(text, io.BytesIO(), limits),
            lambda: audio.source.write_inline(filed(data), io.BytesIO(), limits),
            lambda: audio.media_url.parse_media_url(text, policy),
        )
        for read in reads:
            started = time.thread_time()
            with contextlib.suppress(AudioError):
                read()
            assert time.thread_time() - started < MAX_INLINE_S

    for module in (audio.source, audio.text_file, audio.media_url):
        for name, function in list(vars(module).items()):
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                setattr(module, name, atheris.instrument_func(function))
    corpus = args.findings / "references"
    corpus.mkdir(exist_ok=True)
    for number, text in enumerate(
        ("data:audio/wav;base64,UklGRg==", "UklGRg", "http://a.test/b?c", "data:;base64,%3D")
    ):
        (corpus / f"seed-{number}").write_text(text)
    options = [f"-max_total_time={args.seconds:.0f}", f"-seed={args.seed}", f"-artifact_prefix={args.findings}/"]
    atheris.Setup([sys.argv[0], *options, "-max_len=8192", "-print_final_stats=1", str(corpus)], one)
    atheris.Fuzz()


def filed(data: bytes) -> FiledText:
    """As if a request had it between quotes."""
    file = TextFile()
    file.write(data)
    return FiledText(file, 0, len(data))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("files", "references"))
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    finish({"files": files, "references": references}[args.mode](args), args.output)


if __name__ == "__main__":
    main()
