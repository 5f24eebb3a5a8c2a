"""Speak the training and evaluation utterances once and keep them in one file of 16-bit samples.

    python -m checkpoints.training.synthesise
    python -m checkpoints.training.synthesise --pico 6000

The first writes cache/train.{pcm,jsonl}, cache/held_out.{pcm,jsonl} (other utterances of the training voices) and
cache/sums (each sum once, held out), cache/unseen (festival's voices, never trained on). A line of the index is one
clip: text, voice, offset and length in samples. The second writes cache/pico, more training voices.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from checkpoints.training.vocabulary import DIGITS, WORDS, arithmetic_texts, draw_text
from checkpoints.training.voices import FESTIVAL_VOICES, Voice, draw_pico_voice, draw_voice, speak

CACHE = Path(__file__).parent / "cache"
MAX_SECONDS = 5.0

Job = tuple[str, Voice]


def training_jobs(count: int, rng: random.Random) -> list[Job]:
    return [(draw_text(rng), draw_voice(rng)) for _ in range(count)]


def unseen_jobs(count: int, rng: random.Random) -> list[Job]:
    """Digit strings and known words in festival's voices, at speeds near the voice's own."""
    jobs = []
    for index in range(count):
        voice = Voice("festival", FESTIVAL_VOICES[index % len(FESTIVAL_VOICES)], rng.uniform(0.85, 1.15))
        jobs.append((evaluation_text(rng), voice))
    return jobs


def evaluation_text(rng: random.Random) -> str:
    """Half digit strings of 1 to 6, half whatever training draws."""
    if rng.random() < 0.5:
        return " ".join(rng.choices(DIGITS, k=rng.randint(1, 6)))
    return draw_text(rng)


def _say(job: Job) -> np.ndarray | None:
    try:
        pcm = speak(*job)
    except (subprocess.SubprocessError, RuntimeError):
        return None
    return pcm if 1600 < pcm.size < MAX_SECONDS * 16_000 else None


def write_clips(name: str, jobs: Iterable[Job], workers: int) -> int:
    """Speak every job and append it to cache/<name>; returns how many clips were kept."""
    CACHE.mkdir(exist_ok=True)
    offset = kept = 0
    with (
        (CACHE / f"{name}.pcm").open("wb") as samples,
        (CACHE / f"{name}.jsonl").open("w") as index,
        ThreadPoolExecutor(workers) as pool,
    ):
        jobs = list(jobs)
        for (text, voice), pcm in zip(jobs, pool.map(_say, jobs), strict=True):
            if pcm is None:
                continue
            samples.write((pcm * 32767).astype("<i2").tobytes())
            row = {"text": text, "voice": voice.key, "offset": offset, "length": int(pcm.size)}
            index.write(json.dumps(row) + "\n")
            offset += pcm.size
            kept += 1
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=26_000)
    parser.add_argument("--held-out", type=int, default=600)
    parser.add_argument("--unseen", type=int, default=450)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--pico", type=int, default=0, help="write only cache/pico, with this many clips")
    args = parser.parse_args()
    rng = random.Random(1)
    if args.pico:
        pico = [(word, draw_pico_voice(rng)) for word in WORDS for _ in range(15)]
        pico += [(draw_text(rng), draw_pico_voice(rng)) for _ in range(args.pico - len(pico))]
        print("pico", write_clips("pico", pico, workers=1))
        return
    held_out = [(evaluation_text(rng), draw_voice(rng)) for _ in range(args.held_out)]
    sums = [(text, draw_voice(random.Random(text))) for text in arithmetic_texts()]
    print("sums", write_clips("sums", sums, args.workers), flush=True)
    print("held out", write_clips("held_out", held_out, args.workers), flush=True)
    every_word = [(word, draw_voice(rng)) for word in WORDS for _ in range(60)]
    jobs = every_word + training_jobs(max(0, args.clips - len(every_word)), rng)
    rng.shuffle(jobs)
    print("train", write_clips("train", jobs, args.workers), flush=True)
    print("unseen", write_clips("unseen", unseen_jobs(args.unseen, rng), args.workers), flush=True)


if __name__ == "__main__":
    main()
