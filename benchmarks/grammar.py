"""Structured output: two libraries side by side, and what a JSON schema costs a batch.

    python -m benchmarks.grammar libraries [--vocab-size 150000]
    python -m benchmarks.grammar cost [--size small] [--dtype float32] [--batch 16] [--output-tokens 96]

`libraries` compiles schemas, regexes and hostile sources with llguidance and, where it is installed, xgrammar (it is
no dependency: `pip install --no-deps --target DIR xgrammar apache-tvm-ffi` and DIR on PYTHONPATH), each in a process
of its own that has ten seconds. Where a source compiles, it writes up to 200 random allowed tokens and times each
mask. Without `--vocab-size` the vocabulary is the bundled tokenizer's; with it, that many made of its pieces.

`cost` runs one engine in this process and lets the same batch decode with and without a schema in turn, as many
tokens each, for `--repeats` rounds; on a machine with other work the best rounds say more than the medians. The
schema is an array of objects that no answer finishes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.make_checkpoint import BUNDLED, write_checkpoint
from benchmarks.report import finish
from engine.client import InlineEngineClient
from engine.messages import EngineArgs, EngineRequest, SamplingParams
from server.prompt.tokenizer import Tokenizer
from server.structured.compiler import GrammarCompiler
from tympan.load import percentiles

LIMIT_S = 10.0
MAX_TOKENS = 200

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["new", "regular", "lost"]}},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "number": {"type": "integer"}}},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
}
SOURCES: dict[str, tuple[str, Any]] = {
    "person": ("schema", PERSON),
    "tree": ("schema", TREE),
    "any object": ("schema", {"type": "object"}),
    "200 properties": (
        "schema",
        {"type": "object", "properties": {f"p{k}": {"type": "string"} for k in range(200)}},
    ),
    "email regex": ("regex", r"[a-z0-9._]{1,20}@[a-z]{2,12}\.(com|org|net)"),
    "not enforced: uniqueItems": ("schema", {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}),
    "not enforced: not": ("schema", {"not": {"type": "string"}}),
    "not enforced: multipleOf": ("schema", {"type": "integer", "multipleOf": 7}),
    "hostile: reference cycle": (
        "schema",
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    ),
    "hostile: (a+)+b": ("regex", "(a+)+b"),
    "hostile: a{1,100000}": ("regex", "a{1,100000}"),
    "hostile: open group": ("regex", "(a"),
    "hostile: 20,000 groups": ("regex", "(" * 20_000 + "a" + ")" * 20_000),
    "hostile: states": ("regex", "(.*a.{500}.*b.{500}){10}"),
    "hostile: enum of 100,000": ("schema", {"enum": [f"s{k}" for k in range(100_000)]}),
    "hostile: 2 MB": (
        "schema",
        {"type": "object", "properties": {f"p{k}": {"type": "string"} for k in range(60_000)}},
    ),
    "hostile: 3,000 properties": ("schema", {"type": "object", "properties": {f"p{k}": True for k in range(3000)}}),
    "hostile: multipleOf": ("schema", {"type": "integer", "multipleOf": 62_615_533}),
}


class LlGuidance:
    """The library that serves."""

    def __init__(self, vocabulary: list[bytes], eos: int) -> None:
        import llguidance

        encode = Tokenizer.from_folder(BUNDLED).encode  # larger vocabularies begin with its pieces

        class Vocabulary:
            eos_token_id = eos
            bos_token_id = None
            tokens = vocabulary
            special_token_ids = (eos,)

            def __call__(self, text: bytes) -> list[int]:
                return encode(text.decode(errors="ignore"))

        self.library = llguidance
        self.tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()), n_vocab=len(vocabulary))

    def compile(self, kind: str, source: Any) -> Any:
        """-> a matcher. Raises what the library finds wrong."""
        matcher_class = self.library.LLMatcher
        make = matcher_class.grammar_from_json_schema if kind == "schema" else matcher_class.grammar_from_regex
        limits = self.library.LLParserLimits(verbose_errors=False)
        matcher = matcher_class(self.tokenizer, make(source), log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def mask(self, matcher: Any) -> np.ndarray:
        """-> one bit for each id."""
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return bits

    def push(self, matcher: Any, token_id: int) -> bool:
        """-> whether the text goes on."""
        return matcher.consume_token(token_id) and not matcher.is_stopped()


class XGrammar:
    """The other one."""

    def __init__(self, vocabulary: list[bytes], eos: int) -> None:
        import xgrammar

        self.library = xgrammar
        info = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[eos])
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.bits = np.zeros((1, -(-len(vocabulary) // 32)), dtype=np.int32)

    def compile(self, kind: str, source: Any) -> Any:
        """-> a matcher. Raises what the library finds wrong."""
        if kind == "schema":
            compiled = self.compiler.compile_json_schema(json.dumps(source), strict_mode=False)
        else:
            compiled = self.compiler.compile_regex(source)
        return self.library.GrammarMatcher(compiled)

    def mask(self, matcher: Any) -> np.ndarray:
        """-> one bit for each id."""
        matcher.fill_next_token_bitmask(self.bits)
        return self.bits[0].view(np.uint8)

    def push(self, matcher: Any, token_id: int) -> bool:
        """-> whether the text goes on."""
        return matcher.accept_token(token_id) and not matcher.is_terminated()


LIBRARIES: dict[str, Callable[[list[bytes], int], Any]] = {"llguidance": LlGuidance, "xgrammar": XGrammar}


def make_vocabulary(size: int | None) -> tuple[list[bytes], int]:
    """The bundled tokenizer's pieces, and more made of these. -> texts by id, and the end's id."""
    tokenizer = Tokenizer.from_folder(BUNDLED)
    pieces = [text for token_id, text in enumerate(tokenizer.token_bytes) if token_id not in tokenizer.special_ids]
    known, generator = set(pieces), random.Random(0)
    while size and len(pieces) < size - 1:
        made = b"".join(generator.choices(pieces[256:1280], k=2))
        if made not in known:
            known.add(made)
            pieces.append(made)
    return [*pieces, b"<|end|>"], len(pieces)


def try_source(library: str, kind: str, source: Any, vocab_size: int | None, pipe: Any) -> None:
    """In a process of its own: compile one source and write with it."""
    vocabulary, eos = make_vocabulary(vocab_size)
    started = time.perf_counter()
    tool = LIBRARIES[library](vocabulary, eos)
    row: dict[str, Any] = {"library_ready_s": time.perf_counter() - started}
    before, started = _resident_bytes(), time.perf_counter()
    try:
        matcher = tool.compile(kind, source)
        row["compile_s"] = time.perf_counter() - started
        row["mask_us"] = percentiles(_write(tool, matcher, eos))
        row["outcome"] = "compiled"
    except Exception as error:
        row |= {"outcome": "refused", "error": str(error)[:100], "compile_s": time.perf_counter() - started}
    row["memory_mib"] = (_resident_bytes() - before) / 2**20
    pipe.send(row)


def _write(tool: Any, matcher: Any, eos: int) -> list[float]:
    """-> microseconds of each mask."""
    generator, taken = random.Random(1), []
    for _ in range(MAX_TOKENS):
        started = time.perf_counter()
        bits = tool.mask(matcher)
        taken.append((time.perf_counter() - started) * 1e6)
        ids = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        choices = ids[ids < eos]
        if not len(choices) or not tool.push(matcher, int(generator.choice(choices))):
            break
    return taken


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def libraries(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every library on every source."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for library in LIBRARIES:
        for name, (kind, source) in tqdm(SOURCES.items(), desc=library):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=try_source, args=(library, kind, source, args.vocab_size, theirs))
            process.start()
            theirs.close()
            row: dict[str, Any]
            try:
                row = ours.recv() if ours.poll(LIMIT_S + 10) else {"outcome": f"no end within {LIMIT_S:.0f} s"}
            except EOFError:
                process.join()
                row = {"outcome": f"the process ended (exit code {process.exitcode})"}
            process.kill()
            process.join()
            rows.append({"library": library, "source": name, **row})
    return rows


async def cost(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same batch with and without a schema, in turn."""
    client = await InlineEngineClient.start(
        EngineArgs(str(folder), dtype=args.dtype, max_num_seqs=args.batch, num_threads=args.threads)
    )
    compiler = GrammarCompiler(folder, client.info.vocab_size)
    schema = {"type": "array", "items": PERSON, "minItems": 1000}
    grammar = await compiler.json_schema(schema, "schema")
    tokenizer = Tokenizer.from_folder(folder)
    prompt = tuple(tokenizer.encode("Write a list of the people that you know."))
    num_requests = 0

    async def one(grammar: str | None, seed: int) -> list[float]:
        nonlocal num_requests
        num_requests += 1
        sampling = SamplingParams(
            max_tokens=args.output_tokens, temperature=args.temperature, seed=seed, grammar=grammar
        )
        arrivals = [
            time.perf_counter() async for _ in client.generate(EngineRequest(f"r{num_requests}", prompt, sampling))
        ]
        assert len(arrivals) == args.output_tokens
        return arrivals

    async def batch(grammar: str | None) -> float:
        """-> milliseconds of a step in which the whole batch decodes."""
        arrivals = await asyncio.gather(*(one(grammar, seed) for seed in range(args.batch)))
        begun, ended = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
        return (ended - begun) / (args.output_tokens - 1) * 1e3

    taken: dict[str, list[float]] = {"free": [], "schema": []}
    for _ in tqdm(range(args.repeats + 1), desc="rounds"):
        taken["free"].append(await batch(None))
        taken["schema"].append(await batch(grammar))
    await client.close()
    compiler.close()
    rounds = {name: values[1:] for name, values in taken.items()}
    median_ms = {name: statistics.median(values) for name, values in rounds.items()}
    best_ms = {name: min(values) for name, values in rounds.items()}
    return {
        "batch": args.batch,
        "median_step_ms": median_ms,
        "best_step_ms": best_ms,
        "rounds_ms": rounds,
        "overhead": median_ms["schema"] / median_ms["free"] - 1,
        "overhead_of_best": best_ms["schema"] / best_ms["free"] - 1,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("libraries", "cost"))
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: random weights of --size")
    parser.add_argument("--size", default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the engine; default: all cores")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.what == "libraries":
        finish({"benchmark": "grammar libraries", "rows": libraries(args)}, args.output)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch)
        parameters = None if args.model else write_checkpoint(folder, args.size, args.dtype)
        result = asyncio.run(cost(args, folder))
    finish({"benchmark": "grammar cost", "parameters": parameters, "dtype": args.dtype, **result}, args.output)


if __name__ == "__main__":
    main()
