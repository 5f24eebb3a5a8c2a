"""Speculative decoding by prompt lookup: the same requests with and without it, in turn, in one process.

    python -m benchmarks.speculation speech [--drafts 4]
    python -m benchmarks.speculation script [--size small] [--dtype float32] [--batch 1 16] [--errors 0 0.1 0.3]

`speech` lets the bundled checkpoint transcribe the test clips with their text in the prompt, as for somebody who
reads a script aloud. Real answers, but of three words.

`script` has answers long enough to time, from random weights, which cannot read a script. So each answer is computed
once, and the script is that answer with a share of its tokens replaced; the lookup has it in its index as if it
stood in the prompt, the model does not see it. `none` is the lookup without a script. Times are of decoding alone:
from the step that gives the last sequence its first token on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from benchmarks.make_checkpoint import BUNDLED, write_checkpoint
from benchmarks.report import finish
from engine.core import EngineCore
from engine.messages import AudioClip, EngineArgs, EngineRequest, SamplingParams, SequenceId
from engine.prompt_lookup import PromptLookup
from engine.sequence import Sequence
from engine.speculation import NO_SPECULATION, Speculation
from model.config import Qwen2AudioConfig, num_audio_tokens
from server.prompt.tokenizer import Tokenizer

SPEECH = Path(__file__).parent.parent / "tests" / "fixtures" / "speech"
QUESTION = "Transcribe the audio."


class ScriptLookup(PromptLookup):
    """Looks into a script too, as if it stood before the prompt."""

    def __init__(self, scripts: Mapping[str, tuple[int, ...]], min_ngram: int, max_ngram: int) -> None:
        super().__init__(min_ngram, max_ngram)
        self._scripts = scripts
        self._shadows: dict[SequenceId, Sequence] = {}

    def propose(self, sequence: Sequence, num_tokens: int) -> tuple[int, ...]:
        """See PromptLookup."""
        script = self._scripts[sequence.request_id]
        shadow = self._shadows.get(sequence.sequence_id)
        if shadow is None:
            prompt = (*script, *sequence.request.prompt_token_ids)
            request = replace(sequence.request, prompt_token_ids=prompt, clips=())
            shadow = self._shadows[sequence.sequence_id] = Sequence(request, sequence.seed)
        shadow.token_ids += sequence.token_ids[len(shadow.token_ids) - len(script) :]
        return super().propose(shadow, num_tokens)

    def release(self, sequence_id: SequenceId) -> None:
        """See PromptLookup."""
        super().release(sequence_id)
        self._shadows.pop(sequence_id, None)


@dataclass
class Run:
    """A batch to its end."""

    answers: dict[str, list[int]] = field(default_factory=dict)
    seconds: float = 0.0
    """Of decoding, while all run."""
    num_tokens: int = 0
    num_steps: int = 0
    """Both of that time."""
    num_drafts: int = 0
    num_accepted: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.num_tokens / self.seconds


def run(core: EngineCore, requests: list[EngineRequest], speculation: Speculation) -> Run:
    """Decode a batch with or without drafts."""
    core.scheduler.speculation = speculation
    before = speculation.num_draft_tokens, speculation.num_accepted_tokens
    result = Run({request.request_id: [] for request in requests})
    for request in requests:
        core.add_request(request)
    started = 0.0
    while core.has_work:
        outputs = core.step()
        for output in outputs:
            result.answers[output.request_id] += output.new_token_ids
        if started:
            result.num_tokens += sum(len(output.new_token_ids) for output in outputs)
            result.num_steps += 1
        elif all(result.answers.values()):
            started = time.perf_counter()
    result.seconds = time.perf_counter() - started
    result.num_drafts = speculation.num_draft_tokens - before[0]
    result.num_accepted = speculation.num_accepted_tokens - before[1]
    return result


def compare(plain: list[Run], drafted: list[Run]) -> dict[str, Any]:
    """Rounds of both, as one row."""
    num_drafts = sum(one.num_drafts for one in drafted)
    ratios = [two.tokens_per_second / one.tokens_per_second for one, two in zip(plain, drafted, strict=True)]
    changed = sum(
        one.answers[name] != two.answers[name]
        for one, two in zip(plain, drafted, strict=True)
        for name in one.answers
    )
    return {
        "tokens_per_step": sum(one.num_tokens for one in drafted) / sum(one.num_steps for one in drafted),
        "tokens_per_step_without": sum(one.num_tokens for one in plain) / sum(one.num_steps for one in plain),
        "acceptance_rate": sum(one.num_accepted for one in drafted) / num_drafts if num_drafts else None,
        "drafts_per_step": num_drafts / sum(one.num_steps for one in drafted),
        "tokens_per_second": statistics.median(one.tokens_per_second for one in drafted),
        "tokens_per_second_without": statistics.median(one.tokens_per_second for one in plain),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "answers_that_differ": changed,
    }


def script(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Random weights: how much a step with drafts costs, and what it brings, by how good the script is."""
    core = EngineCore.build(_engine_args(folder, args))
    rows = []
    for batch in args.batch:
        requests = [_noise_request(f"r{index}", index, args) for index in range(batch)]
        answers = run(core, requests, NO_SPECULATION).answers
        scripts = {error: _scripts(answers, error) for error in args.errors}
        plain: dict[float | None, list[Run]] = {error: [] for error in [*args.errors, None]}
        drafted: dict[float | None, list[Run]] = {error: [] for error in [*args.errors, None]}
        for _ in tqdm(range(args.repeats), desc=f"batch {batch}"):
            for error in plain:
                lookup = (
                    PromptLookup(args.min, args.max)
                    if error is None
                    else ScriptLookup(scripts[error], args.min, args.max)
                )
                plain[error].append(run(core, requests, NO_SPECULATION))
                drafted[error].append(run(core, requests, _speculation(core, lookup, args.drafts)))
        rows += [
            {
                "batch": batch,
                "script_errors": "none" if error is None else error,
                **compare(plain[error], drafted[error]),
            }
            for error in plain
        ]
    return rows


def speech(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The bundled checkpoint: clips whose text stands in the prompt, one at a time and all at once."""
    core = EngineCore.build(_engine_args(BUNDLED, args))
    rows = []
    for with_script in (True, False):
        requests = _speech_requests(with_script)
        for batch in (1, len(requests)):
            pairs = []
            for _ in tqdm(range(args.repeats), desc=f"batch {batch}"):
                for start in range(0, len(requests), batch):
                    piece = requests[start : start + batch]
                    lookup = PromptLookup(args.min, args.max)
                    plain = run(core, piece, NO_SPECULATION)
                    pairs.append((plain, run(core, piece, _speculation(core, lookup, args.drafts))))
            pairs = [pair for pair in pairs if all(one.num_steps for one in pair)]
            plains, drafts = map(list, zip(*pairs, strict=True))
            rows.append({"batch": batch, "script_in_prompt": with_script, **compare(plains, drafts)})
    return rows


def _engine_args(folder: Path, args: argparse.Namespace) -> EngineArgs:
    """One engine for both kinds of run, so without overlap, which drafts rule out."""
    return EngineArgs(
        str(folder), dtype=args.dtype, num_threads=args.threads, device=args.device, async_scheduling=False
    )


def _speculation(core: EngineCore, lookup: PromptLookup, num_drafts: int) -> Speculation:
    return Speculation(lookup, num_drafts, core.info.max_model_len)


def _scripts(answers: dict[str, list[int]], error: float) -> dict[str, tuple[int, ...]]:
    """The answers, with a share of their tokens replaced by others of the same answers."""
    generator = random.Random(0)
    pool = [token_id for answer in answers.values() for token_id in answer]
    return {
        name: tuple(generator.choice(pool) if generator.random() < error else token_id for token_id in answer)
        for name, answer in answers.items()
    }


def _noise_request(name: str, seed: int, args: argparse.Namespace) -> EngineRequest:
    """A clip of noise and a question; its answer has a fixed length."""
    samples = (np.random.default_rng(seed).standard_normal(32_000) * 0.1).astype(np.float32)
    tokenizer = Tokenizer.from_folder(BUNDLED)
    sampling = SamplingParams(max_tokens=args.output_tokens, temperature=args.temperature, seed=seed)
    return _request(name, tokenizer, samples, QUESTION, sampling)


def _speech_requests(with_script: bool) -> list[EngineRequest]:
    tokenizer = Tokenizer.from_folder(BUNDLED)
    sampling = SamplingParams(max_tokens=64, temperature=0.0, stop_token_ids=(tokenizer.special["<|im_end|>"],))
    clips = json.loads((SPEECH / "transcripts.json").read_text(encoding="utf-8"))
    return [
        _request(
            name,
            tokenizer,
            soundfile.read(SPEECH / name, dtype="float32")[0],
            f"{clip['text']}\n{QUESTION}" if with_script else QUESTION,
            sampling,
        )
        for name, clip in clips.items()
        if QUESTION in clip["answers"]
    ]


def _request(
    name: str, tokenizer: Tokenizer, samples: np.ndarray, question: str, sampling: SamplingParams
) -> EngineRequest:
    """A chat of one turn, as the template writes it."""
    special = tokenizer.special
    start, end = special["<|im_start|>"], special["<|im_end|>"]
    newline = tokenizer.encode("\n")
    count = num_audio_tokens(len(samples))
    system = [start, *tokenizer.encode("system\nYou are a helpful assistant."), end, *newline]
    opening = [*system, start, *tokenizer.encode("user\nAudio 1: "), special["<|audio_bos|>"]]
    placeholder = Qwen2AudioConfig.from_folder(BUNDLED).audio_token_id
    closing = [special["<|audio_eos|>"], *newline, *tokenizer.encode(question), end, *newline]
    prompt = (*opening, *[placeholder] * count, *closing, start, *tokenizer.encode("assistant\n"))
    return EngineRequest(name, prompt, sampling, (AudioClip(samples, name, len(opening), count),))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speech", "script"))
    parser.add_argument("--model", type=Path, help="a checkpoint folder for `script`; default: random weights")
    parser.add_argument("--size", default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--errors", type=float, nargs="+", default=[0.0, 0.1, 0.3])
    parser.add_argument("--drafts", type=int, default=4, help="as --num-speculative-tokens")
    parser.add_argument("--min", type=int, default=2, help="as --prompt-lookup-min")
    parser.add_argument("--max", type=int, default=8, help="as --prompt-lookup-max")
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the engine; default: all cores")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.what == "speech":
            rows = speech(args)
        else:
            folder = args.model or Path(scratch)
            if args.model is None:
                write_checkpoint(folder, args.size, args.dtype)
            rows = script(args, folder)
    options = {name: getattr(args, name) for name in ("dtype", "drafts", "min", "max", "temperature", "threads")}
    finish({"benchmark": f"speculation {args.what}", **options, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
