"""What fewer bits do to a checkpoint's answers: logit divergence and greedy agreement, on spoken prompts.

    python -m benchmarks.accuracy [--model FOLDER] [--variants fp8_kv fp8 ...] [--checkpoint NAME=FOLDER ...]

The model as stored, in `--dtype`, answers questions about the test clips greedily. Every variant reads the same
prompts with the same answers behind them, and its distributions over the next token are compared with the model's at
each place of an answer; then it answers by itself. A variant is one of those below, or with `--checkpoint` a folder
of the same model with other weights (AWQ, GPTQ, float8).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import finish
from engine.device import DTYPES, resolve_device
from model import fp8
from model.attention import AttentionMetadata
from model.attention.reference import ReferenceBackend, rotate
from model.config import GenerationConfig, Qwen2AudioConfig, num_audio_tokens
from model.cpu import prepare_for_cpu
from model.kv_cache import allocate_kv_cache
from model.loader import load_model
from model.quantization.fp8_linear import round_to_fp8
from model.qwen2_audio import Qwen2Audio
from server.prompt.builder import PromptBuilder
from server.prompt.chat_template import AUDIO, ChatTemplate, Turn
from server.prompt.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "checkpoints" / "tympan-tiny"
SPEECH = ROOT / "tests" / "fixtures" / "speech"
BLOCK_SIZE = 16
SMALLEST = 2.0**-40


class WatchingBackend(ReferenceBackend):
    """Keeps the largest key and value of each head of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[int, Tensor] = {}
        """By the address of the layer's cache: [2, Hkv]."""

    def decode(self, heads: Tensor, cos: Tensor, sin: Tensor, kv_layer: Tensor, *rest: Any) -> Tensor:
        """See ReferenceBackend."""
        _, key, value = rotate(heads, cos, sin, kv_layer.shape[3])
        seen = torch.stack([x.float().abs().amax((0, 2)) for x in (key, value)])
        place = kv_layer.storage_offset()
        self.largest[place] = torch.maximum(seen, self.largest.get(place, seen))
        return super().decode(heads, cos, sin, kv_layer, *rest)


@dataclass(frozen=True)
class Prompt:
    """Token ids and the clip that fills their placeholders."""

    token_ids: list[int]
    samples: Tensor


class Reader:
    """One model, one sequence at a time, without an engine."""

    def __init__(self, model: Qwen2Audio, audio_token_id: int, max_tokens: int) -> None:
        self.model = model
        self._audio_token_id = audio_token_id
        num_blocks = -(-max_tokens // BLOCK_SIZE) + 1
        text, device = model.config.text, model.device
        self._kv = allocate_kv_cache(text, num_blocks, BLOCK_SIZE, model.kv_cache_dtype, device)

    @torch.inference_mode()
    def logits(self, prompt: Prompt, answer: list[int]) -> Tensor:
        """Over the next token, at the prompt's end and behind each token of the answer. -> float32 [1 + len, V]."""
        token_ids = torch.tensor(prompt.token_ids + answer, dtype=torch.int32, device=self.model.device)
        hidden = self.model.embed(token_ids)
        (rows,) = self.model.encode_audio([prompt.samples.to(self.model.device)])
        hidden[token_ids == self._audio_token_id] = rows
        return self._forward(hidden, 0)[len(prompt.token_ids) - 1 :]

    @torch.inference_mode()
    def greedy(self, prompt: Prompt, stop: frozenset[int], max_tokens: int) -> list[int]:
        """Token by token, through the cache."""
        answer: list[int] = []
        logits = self.logits(prompt, [])
        while len(answer) < max_tokens:
            answer.append(int(logits[-1].argmax()))
            if answer[-1] in stop:
                break
            token = torch.tensor(answer[-1:], dtype=torch.int32, device=self.model.device)
            logits = self._forward(self.model.embed(token), len(prompt.token_ids) + len(answer) - 1)
        return answer

    def _forward(self, hidden: Tensor, start: int) -> Tensor:
        """Tokens from `start` on, the sequence's blocks being 1, 2, ... -> [T, V]."""
        device, end = hidden.device, start + hidden.shape[0]
        positions = torch.arange(start, end, dtype=torch.int32, device=device)
        metadata = AttentionMetadata(
            query_lens=(end - start,),
            seq_lens=(end,),
            num_decodes=int(end - start == 1),
            first_blocks=(1,),
            block_table=torch.arange(1, self._kv.shape[2], dtype=torch.int32, device=device)[None],
            slot_mapping=positions + BLOCK_SIZE,
            seq_lens_device=torch.tensor([end], dtype=torch.int32, device=device),
            query_starts=torch.tensor([0, end - start], dtype=torch.int32, device=device),
        )
        return self.model.compute_logits(self.model(hidden, positions, self._kv, metadata))


def spoken_prompts(folder: Path, config: Qwen2AudioConfig) -> list[Prompt]:
    """The questions of the test clips, as this checkpoint's template writes them."""
    template, tokenizer = ChatTemplate.from_folder(folder), Tokenizer.from_folder(folder)
    builder = PromptBuilder(tokenizer, template, config.audio_token_id, config.text.max_position_embeddings)
    prompts = []
    for name, clip in json.loads((SPEECH / "transcripts.json").read_text(encoding="utf-8")).items():
        samples = torch.from_numpy(soundfile.read(SPEECH / name, dtype="float32")[0])
        for question in clip["answers"]:
            turn = Turn("user", (AUDIO, question) if question else (AUDIO,))
            prompt = builder.chat([turn], [num_audio_tokens(len(samples))])
            prompts.append(Prompt(list(prompt.token_ids), samples))
    return prompts


def unit_scales(model: Qwen2Audio, _: WatchingBackend) -> None:
    """Scales of 1: keys and values rounded as they are."""
    for layer in model.decoder.layers:
        scales = layer.self_attn.kv_scales
        layer.self_attn.kv_scales = None if scales is None else torch.ones_like(scales)


def calibrated_scales(model: Qwen2Audio, watched: WatchingBackend) -> None:
    """Scales that bring the largest values of these very prompts to the largest float8: calibration at its best."""
    for layer, place in zip(model.decoder.layers, sorted(watched.largest), strict=True):
        layer.self_attn.kv_scales = (watched.largest[place] / fp8.MAX).clamp(min=SMALLEST)


def fp8_weights(model: Qwen2Audio, _: WatchingBackend) -> None:
    """As --quantization fp8."""
    round_to_fp8(model.decoder)


def int8_weights(model: Qwen2Audio, _: WatchingBackend) -> None:
    """As --quantization int8."""
    prepare_for_cpu(model, int8=True)


def nothing(model: Qwen2Audio, _: WatchingBackend) -> None:
    """As loaded."""


VARIANTS: dict[str, tuple[bool, str, Callable[[Qwen2Audio, WatchingBackend], None]]] = {
    "bfloat16": (False, "bfloat16", nothing),
    "fp8_kv": (True, "", nothing),
    "fp8_kv_unit_scales": (True, "", unit_scales),
    "fp8_kv_calibrated_scales": (True, "", calibrated_scales),
    "fp8": (False, "", fp8_weights),
    "fp8_and_fp8_kv": (True, "", fp8_weights),
    "int8": (False, "", int8_weights),
}
"""Name -> whether the KV cache is float8, a precision of its own or "", and what is done to the loaded model."""


def compare(
    reference: list[tuple[Tensor, list[int]]], reader: Reader, prompts: list[Prompt], stop: Any
) -> dict[str, Any]:
    """One variant's figures. `reference`: of each prompt the logits along its greedy answer, and that answer."""
    divergence, same_token, same_answer, largest = [], [], [], 0.0
    for (logits, answer), prompt in zip(reference, prompts, strict=True):
        ours = reader.logits(prompt, answer[:-1]).cpu()
        theirs = logits.log_softmax(-1)
        divergence.append((theirs.exp() * (theirs - ours.log_softmax(-1))).sum(-1))
        same_token.append(ours.argmax(-1) == logits.argmax(-1))
        largest = max(largest, float((ours - logits).abs().max()))
        same_answer.append(reader.greedy(prompt, stop, len(answer)) == answer)
    kl, same = torch.cat(divergence), torch.cat(same_token)
    return {
        "mean_kl": float(kl.mean()),
        "p99_kl": float(kl.quantile(0.99)),
        "largest_kl": float(kl.max()),
        "largest_logit_error": largest,
        "same_next_token": float(same.float().mean()),
        "same_answer": sum(same_answer) / len(same_answer),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All variants against the model as stored."""
    device = resolve_device(args.device)
    config = Qwen2AudioConfig.from_folder(args.model)
    stop = frozenset(GenerationConfig.from_folder(args.model).eos_token_ids)
    prompts = spoken_prompts(args.model, config)[: args.prompts]
    longest = max(len(prompt.token_ids) for prompt in prompts) + args.max_tokens
    watching = WatchingBackend()

    def reader(folder: Path, dtype: str, fp8_kv: bool, backend: ReferenceBackend, change: Any) -> Reader:
        shape = Qwen2AudioConfig.from_folder(folder)
        model = load_model(folder, shape, backend, DTYPES[dtype or args.dtype], device, fp8_kv=fp8_kv)
        change(model, watching)
        return Reader(model, config.audio_token_id, longest)

    plain = reader(args.model, "", False, watching, nothing)
    reference = []
    for prompt in tqdm(prompts, desc="as stored"):
        answer = plain.greedy(prompt, stop, args.max_tokens)
        reference.append((plain.logits(prompt, answer[:-1]).cpu(), answer))
    del plain
    results = {}
    for name in tqdm(args.variants, desc="variants"):
        fp8_kv, dtype, change = VARIANTS[name]
        results[name] = compare(
            reference, reader(args.model, dtype, fp8_kv, ReferenceBackend(), change), prompts, stop
        )
    for name, folder in args.checkpoint:
        other = reader(folder, "", False, ReferenceBackend(), nothing)
        results[name] = compare(reference, other, prompts, stop)
    num_places = sum(len(answer) for _, answer in reference)
    return {"model": args.model.name, "dtype": args.dtype, "prompts": len(prompts), "places": num_places} | {
        "results": results
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """For people."""
    rows = ["| variant | mean KL | p99 KL | largest KL | same next token | same answer |", "| --- |" + " ---: |" * 5]
    for name, figures in results.items():
        kl = " | ".join(f"{figures[key]:.2e}" for key in ("mean_kl", "p99_kl", "largest_kl"))
        rows.append(f"| {name} | {kl} | {figures['same_next_token']:.1%} | {figures['same_answer']:.1%} |")
    return "\n".join(rows)


def _named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not (Path(folder) / "config.json").exists():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER of a checkpoint")
    return name, Path(folder)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="what it is compared in")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--checkpoint", type=_named_folder, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--prompts", type=int, help="only the first so many")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = measure(args)
    print(table(result["results"]))
    finish(result, args.output)


if __name__ == "__main__":
    main()
