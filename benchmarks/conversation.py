"""Conversations about a clip, replayed turn by turn on two engines, with the prefix cache and without, in one run.

    python -m benchmarks.conversation [--model FOLDER] [--clip-seconds 10] [--turns 5] [--conversations 5]

A random checkpoint of `--size` by default. The first turn brings a clip and a question, the second asks about the
same clip again, the others go on talking; each prompt holds the whole conversation so far, as a chat client sends
it, with the answers that were given. The two engines take turns, one request at a time. The first conversation warms
up.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from benchmarks.make_checkpoint import write_checkpoint
from benchmarks.offline import make_clips
from benchmarks.report import finish
from engine.client import ProcessEngineClient
from engine.messages import AudioClip, EngineArgs, EngineRequest, SamplingParams
from model.config import num_audio_tokens

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QUESTIONS = (
    "What does the person say? Please transcribe.",
    "And what else can be heard in that recording, behind the voice?",
    "Is the speaker in a hurry? Say how you can tell.",
    "Write that down as a short note to a colleague who has not heard it.",
    "Now in one sentence.",
)


@dataclass
class Conversation:
    """Its tokens so far."""

    clip: AudioClip
    salt: str
    """Its own, so that conversations find nothing of each other."""
    token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Turn:
    """What one turn took."""

    ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    answer: tuple[int, ...]


class Replay:
    """One engine and the conversations with it."""

    def __init__(self, client: ProcessEngineClient, folder: Path, num_tokens: int) -> None:
        self.client = client
        self.num_tokens = num_tokens
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.audio_token = self.tokenizer.token_to_id("<|AUDIO|>")

    def begin(self, samples: Any, name: str) -> Conversation:
        """A conversation that has a clip in front of its first question."""
        ids = self.tokenizer.encode(SYSTEM + "<|im_start|>user\nAudio 1: <|audio_bos|>").ids
        count = num_audio_tokens(len(samples))
        rest = self.tokenizer.encode("<|audio_eos|>\n").ids
        clip = AudioClip(samples, name, len(ids), count)
        return Conversation(clip, name, [*ids, *[self.audio_token] * count, *rest])

    async def turn(self, conversation: Conversation, index: int) -> Turn:
        """Ask the next question and take the answer in."""
        question = QUESTIONS[index % len(QUESTIONS)] + "<|im_end|>\n<|im_start|>assistant\n"
        opening = "<|im_end|>\n<|im_start|>user\n" if index else ""
        conversation.token_ids += self.tokenizer.encode(opening + question).ids
        request = EngineRequest(
            f"{conversation.salt}-{index}",
            tuple(conversation.token_ids),
            SamplingParams(max_tokens=self.num_tokens, temperature=0.0),
            (conversation.clip,),
            cache_salt=conversation.salt,
        )
        started = time.perf_counter()
        first, cached, answer = 0.0, 0, []
        async for output in self.client.generate(request):
            first = first or time.perf_counter()
            cached += output.num_cached_tokens
            answer += output.new_token_ids
        assert len(answer) == self.num_tokens
        conversation.token_ids += answer
        return Turn(first - started, len(request.prompt_token_ids), cached, tuple(answer))


async def replay(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All conversations on both engines, turn and turn about."""
    clients = {
        name: await ProcessEngineClient.start(
            EngineArgs(str(folder), dtype=args.dtype, enable_prefix_caching=name == "cached")
        )
        for name in ("cached", "plain")
    }
    replays = {name: Replay(client, folder, args.output_tokens) for name, client in clients.items()}
    taken: list[dict[str, list[Turn]]] = []
    for number in tqdm(range(args.conversations + 1), desc="conversations"):
        (samples,) = make_clips(1, args.clip_seconds, seed=number)
        talks = {name: side.begin(samples, f"talk {number}") for name, side in replays.items()}
        turns: dict[str, list[Turn]] = {name: [] for name in replays}
        for index in range(args.turns):
            for name, side in replays.items():
                turns[name].append(await side.turn(talks[name], index))
        taken.append(turns)
    for client in clients.values():
        await client.close()
    return _summary(taken[1:], args.turns)


def _summary(taken: list[dict[str, list[Turn]]], num_turns: int) -> dict[str, Any]:
    rows = []
    for index in range(num_turns):
        ttft = {name: [turns[name][index].ttft_s for turns in taken] for name in ("plain", "cached")}
        median = {name: statistics.median(values) for name, values in ttft.items()}
        last = taken[-1]["cached"][index]
        rows.append(
            {
                "turn": index + 1,
                "prompt_tokens": last.prompt_tokens,
                "cached_tokens": last.cached_tokens,
                "ttft_s": ttft,
                "median_ttft_s": median,
                "ratio": median["cached"] / median["plain"],
            }
        )
    same = [
        turns["plain"][index].answer == turns["cached"][index].answer
        for turns in taken
        for index in range(num_turns)
    ]
    return {"rows": rows, "last_turn_ratio": rows[-1]["ratio"], "same_answers": sum(same) / len(same)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: random weights of --size")
    parser.add_argument("--size", default="small")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clip-seconds", type=float, default=10.0)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--conversations", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch)
        parameters = None if args.model else write_checkpoint(folder, args.size, "bfloat16")
        result = asyncio.run(replay(args, folder))
    settings = {"parameters": parameters, "dtype": args.dtype, "clip_seconds": args.clip_seconds}
    finish({"benchmark": "conversation", **settings, **result}, args.output)


if __name__ == "__main__":
    main()
