"""Our engine against `transformers` with a static batch, same checkpoint, same clips, one run.

    python -m benchmarks.offline [--size small] [--dtype bfloat16] [--requests 1 16] [--clip-seconds 10 2]

Each side gets all requests at once, waits for the last answer and is timed over `--repeats` rounds after a warm-up;
the median counts. transformers runs the batch the way its users do: processor, left padding, `generate`; its first
tokens are timed where `generate` asks whether to stop. Ours runs through the engine's client, in its own process,
samples crossing the border. Clips differ from each other and from round to round, so no cache helps anybody. End of
sequence is ignored: every request gets `--output-tokens` tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.make_checkpoint import write_checkpoint
from benchmarks.report import finish
from engine.client import ProcessEngineClient
from engine.messages import AudioClip, EngineArgs, EngineRequest, SamplingParams
from model.config import num_audio_tokens
from tympan.load import percentiles
from tympan.session import OFFLINE_TOKEN_BUDGET

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nAudio 1: <|audio_bos|><|AUDIO|>"
    "<|audio_eos|>\nWhat does the person say? Please transcribe.<|im_end|>\n<|im_start|>assistant\n"
)


def make_clips(count: int, seconds: float, seed: int) -> list[np.ndarray]:
    """Noise shaped like speech is loud: amplitude does not matter to speed, difference does."""
    generator = np.random.default_rng(seed)
    return [(generator.standard_normal(int(seconds * 16000)) * 0.1).astype(np.float32) for _ in range(count)]


class Transformers:
    """`generate` on a static batch."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import (
            Qwen2AudioForConditionalGeneration,
            Qwen2AudioProcessor,
            Qwen2Tokenizer,
            StoppingCriteriaList,
            WhisperFeatureExtractor,
        )

        self.torch = torch
        self.criteria = StoppingCriteriaList
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, padding_side="left")
        tokenizer.pad_token = "<|endoftext|>"
        self.processor = Qwen2AudioProcessor(WhisperFeatureExtractor.from_pretrained(folder), tokenizer)
        self.model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(self, clips: list[np.ndarray], num_tokens: int) -> dict[str, Any]:
        """One batch, start to end."""
        started = time.perf_counter()
        inputs = self.processor(
            text=[PROMPT] * len(clips), audio=clips, return_tensors="pt", padding=True, sampling_rate=16000
        )
        inputs["input_features"] = inputs["input_features"].to(self.model.dtype)
        tokens_at: list[float] = []

        def go_on(ids: Any, _scores: Any, **_: Any) -> Any:
            tokens_at.append(time.perf_counter())
            return self.torch.zeros(len(ids), dtype=self.torch.bool)

        with self.torch.inference_mode():
            out = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                stopping_criteria=self.criteria([go_on]),
            )
        assert out.shape[1] == inputs["input_ids"].shape[1] + num_tokens
        return {"wall_s": time.perf_counter() - started, "ttft_s": [tokens_at[0] - started] * len(clips)}


class Tympan:
    """The engine's process, all requests at once."""

    def __init__(self, client: ProcessEngineClient, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.client = client
        self.prompt_ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids
        self.audio_token = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<|AUDIO|>")

    async def run(self, clips: list[np.ndarray], num_tokens: int) -> dict[str, Any]:
        """All requests, start to last answer."""
        started = time.perf_counter()
        first = await asyncio.gather(*(self._one(clip, num_tokens) for clip in clips))
        return {"wall_s": time.perf_counter() - started, "ttft_s": [t - started for t in first]}

    async def _one(self, clip: np.ndarray, num_tokens: int) -> float:
        """-> when the first token came."""
        count = num_audio_tokens(len(clip))
        at = self.prompt_ids.index(self.audio_token)
        ids = (*self.prompt_ids[:at], *[self.audio_token] * count, *self.prompt_ids[at + 1 :])
        name = f"{id(clip)}-{time.perf_counter_ns()}"
        request = EngineRequest(
            name, ids, SamplingParams(max_tokens=num_tokens, temperature=0.0), (AudioClip(clip, name, at, count),)
        )
        first, received = None, 0
        async for output in self.client.generate(request):
            first = first or time.perf_counter()
            received += len(output.new_token_ids)
        assert received == num_tokens
        return first or time.perf_counter()


async def compare(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Both sides in turn, for each clip length and number of requests."""
    rows = []
    peer = Transformers(folder, args.dtype)
    client = await ProcessEngineClient.start(
        EngineArgs(
            str(folder), dtype=args.engine_dtype or args.dtype, max_num_batched_tokens=args.max_num_batched_tokens
        )
    )
    ours = Tympan(client, folder)
    cells = [(seconds, requests) for seconds in args.clip_seconds for requests in args.requests]
    rounds = tqdm(total=len(cells) * (args.repeats + 1), desc="rounds", unit="round")
    for seconds, requests in cells:
        taken: dict[str, list[dict[str, Any]]] = {"tympan": [], "transformers": []}
        for repeat in range(args.repeats + 1):
            clips = make_clips(requests, seconds, seed=1000 * repeat + 100 * requests + int(seconds))
            taken["tympan"].append(await ours.run(clips, args.output_tokens))
            taken["transformers"].append(await asyncio.to_thread(peer.run, clips, args.output_tokens))
            rounds.update()
        rows.append(_summary(seconds, requests, {name: runs[1:] for name, runs in taken.items()}))
    await client.close()
    return rows


def _summary(seconds: float, requests: int, taken: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    wall = {name: statistics.median(run["wall_s"] for run in runs) for name, runs in taken.items()}
    return {
        "clip_seconds": seconds,
        "requests": requests,
        "requests_per_s": {name: requests / value for name, value in wall.items()},
        "wall_s": {name: [run["wall_s"] for run in runs] for name, runs in taken.items()},
        "ttft_s": {name: percentiles([t for run in runs for t in run["ttft_s"]]) for name, runs in taken.items()},
        "speedup": wall["transformers"] / wall["tympan"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: random weights of --size")
    parser.add_argument("--size", default="small")
    parser.add_argument("--dtype", default="bfloat16", help="of both sides")
    parser.add_argument("--engine-dtype", help="of ours alone, where it should choose otherwise (auto)")
    parser.add_argument("--requests", type=int, nargs="+", default=[16], help="at once")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--clip-seconds", type=float, nargs="+", default=[10.0, 2.0])
    parser.add_argument("--max-num-batched-tokens", type=int, default=OFFLINE_TOKEN_BUDGET, help="ours, of a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch)
        parameters = None if args.model else write_checkpoint(folder, args.size, "bfloat16")
        rows = asyncio.run(compare(args, folder))
    finish({"benchmark": "offline", "parameters": parameters, "dtype": args.dtype, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
