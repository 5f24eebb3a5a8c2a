"""The last stage of training: the decoder alone, on clips that were encoded once, until it can choose between two.

    python -m checkpoints.training.pairs --start checkpoints/tympan-tiny --minutes 45

Continues from an exported folder, whose decoder may have fewer layers than `NetworkSizes` now says: the new ones
begin as the identity. The encoder stays as it is, so each clip is encoded once and a step costs the decoder only.
Begins with mostly pairs of single words ("What does the second audio say?"), then mixes in everything else.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, multiprocessing

from checkpoints.training.batches import BatchMaker, ClipStore, Row, collate, expand
from checkpoints.training.network import Network, NetworkSizes
from checkpoints.training.prompts import Conversation, Heard, PromptRenderer, ask_for_one_of, converse
from checkpoints.training.synthesise import CACHE
from checkpoints.training.train import RUNS, Peers, answer_loss

NEW_LAYERS = (0, 2)  # where layers are put into a decoder of three: below all others, and below reading
EASY_AT_FIRST, EASY_AT_LAST = 0.8, 0.05  # share of conversations that ask for one of two single words
EASY_FALLS = 0.001  # in a step


@dataclass(frozen=True)
class EncodedClip:
    """A clip's encoder rows [A, C] before the projector, and what it holds."""

    rows: Tensor
    heard: Heard

    @property
    def is_short(self) -> bool:
        return len(self.heard.text.split()) <= 1


def grow(tensors: dict[str, Tensor], network: Network) -> None:
    """Load an exported decoder into a deeper one; layers that it lacks add nothing at first."""
    stem = "language_model.model.layers."
    depth = 1 + max(int(name[len(stem) :].split(".")[0]) for name in tensors if name.startswith(stem))
    new = NEW_LAYERS if network.sizes.layers > depth else ()
    places = [layer for layer in range(network.sizes.layers) if layer not in new]
    assert len(places) == depth, f"{depth} layers cannot become {network.sizes.layers}"
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(stem):
            layer, rest = name[len(stem) :].split(".", 1)
            name = f"{stem}{places[int(layer)]}.{rest}"
        renamed[name] = tensor.float()
    missing, unexpected = network.load_state_dict(renamed, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("ctc_") or int(name[len(stem) :].split(".")[0]) in new for name in missing), missing
    with torch.no_grad():
        for layer in new:
            block = network.language_model.model.layers[layer]
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()


@torch.no_grad()
def encode_pool(network: Network, maker: BatchMaker, count: int) -> list[EncodedClip]:
    """About `count` augmented clips, a third of them short ones, through the encoder."""
    pool: list[EncodedClip] = []
    groups = 0
    while len(pool) < count:
        group = maker.group(40, sounds=0.12, easy=0.0 if groups % 3 else 1.0)
        groups += 1
        _, pooled = network.audio_tower(group.mel, group.num_frames)
        pool += [EncodedClip(rows.half(), heard) for rows, heard in zip(pooled, group.heard, strict=True)]
    return pool


class ConversationMaker:
    """Conversations about clips of a pool, as rows of token ids with the clips behind them."""

    def __init__(self, pool: list[EncodedClip], renderer: PromptRenderer, seed: int) -> None:
        self.pool, self.renderer = pool, renderer
        self.short = [number for number, clip in enumerate(pool) if clip.is_short]
        self._random = random.Random(seed)

    def rows(self, count: int, easy: float) -> list[Row]:
        """`easy` of the rows ask for one of two single words; of the others half are about two clips."""
        return [self._easy() if self._random.random() < easy else self._any() for _ in range(count)]

    def _easy(self) -> Row:
        first, second = self._two(self.short)
        return self._row(
            ask_for_one_of(self.pool[first].heard, self.pool[second].heard, self._random), [first, second]
        )

    def _any(self) -> Row:
        kind = self._random.random()
        clips = self._two(range(len(self.pool))) if kind < 0.55 else [self._random.randrange(len(self.pool))]
        clips = clips if kind < 0.98 else []
        return self._row(converse([self.pool[clip].heard for clip in clips], self._random), clips)

    def _two(self, numbers: list[int] | range) -> list[int]:
        while True:
            first, second = self._random.choice(numbers), self._random.choice(numbers)
            if self.pool[first].heard != self.pool[second].heard:
                return [first, second]

    def _row(self, conversation: Conversation, clips: list[int]) -> Row:
        tokens = {clip: len(self.pool[clip].rows) for clip in clips}
        return expand(self.renderer, conversation, clips, tokens)


@torch.no_grad()
def share_right(network: Network, maker: ConversationMaker, rows: list[Row]) -> float:
    """The share of rows whose every learnt token is the likeliest one, given those before it."""
    right = total = 0
    for part in collate(rows, maker.renderer.audio_id):
        audio = project(network, maker, part.clips)
        x = network.embed(part.token_ids, part.is_audio, torch.cat([audio[clip] for clip in part.clips]))
        states = network.language_model.model(x, (part.answer_rows, part.answer_columns))
        wrong = part.answer_rows[network.logits(states).argmax(-1) != part.answer_ids]
        total += len(part.token_ids)
        right += len(part.token_ids) - len(set(wrong.tolist()))
    return right / total


def project(network: Network, maker: ConversationMaker, clips: list[int]) -> dict[int, Tensor]:
    """The projected rows [A, C] of each of `clips`, by its number in the pool."""
    numbers = sorted(set(clips))
    rows = [maker.pool[number].rows for number in numbers]
    projected = network.multi_modal_projector.linear(torch.cat([r.float() for r in rows]))
    return dict(zip(numbers, projected.float().split([len(r) for r in rows]), strict=True))


class PairTrainer:
    """Network, optimiser and clips of one process."""

    def __init__(self, args: argparse.Namespace, peers: Peers) -> None:
        self.args, self.peers = args, peers
        self.folder = RUNS / args.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.network = Network(NetworkSizes())
        grow(load_file(args.start / "model.safetensors"), self.network)
        self.network.audio_tower.requires_grad_(False)
        trained = (self.network.multi_modal_projector, self.network.language_model)
        self.parameters = [p for module in trained for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True
        )
        renderer, seed = PromptRenderer(), 7_000_000 + 1_000 * peers.rank
        self.network.eval()
        store = ClipStore(CACHE, args.sets)
        pool = encode_pool(self.network, BatchMaker(store, renderer, seed), args.pool // peers.count)
        self.maker = ConversationMaker(pool, renderer, seed + 1)
        self.is_id = renderer.encode(" is")[0]
        self.tests: dict[str, list[Row]] = {}
        if peers.rank == 0:
            unseen = encode_pool(self.network, BatchMaker(ClipStore(CACHE, ["held_out"]), renderer, 1), 400)
            self.examiner = ConversationMaker(unseen, renderer, 2)
            self.tests = {"short pairs": self.examiner.rows(200, 1.0), "all": self.examiner.rows(300, 0.0)}

    def run(self) -> None:
        step, elapsed, mark, total = 0, 0.0, time.monotonic(), 0.0
        while elapsed < 60 * self.args.minutes:
            now = time.monotonic()
            loss, elapsed = self._one_step(step, elapsed, now - mark)
            mark, step, total = now, step + 1, total + loss
            if self.peers.rank == 0 and step % 50 == 0:
                print(f"step {step} {elapsed / 60:.1f} min  answer {total / 50:.3f}", flush=True)
                total = 0.0
            if step % self.args.save_every == 0:
                self._save_and_report(step, elapsed)
        self._save_and_report(step, elapsed)

    def _one_step(self, step: int, elapsed: float, seconds: float) -> tuple[float, float]:
        """One update; returns (the loss, the run's clock)."""
        progress = min(1.0, elapsed / (60 * self.args.minutes))
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * min(1.0, (step + 1) / 100) * decay
        self.network.train()
        easy = max(EASY_AT_LAST, EASY_AT_FIRST - EASY_FALLS * step)
        rows = self.maker.rows(self.args.rows // self.peers.count, easy)
        parts = collate(rows, self.maker.renderer.audio_id)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            clips = project(self.network, self.maker, [clip for row in rows for clip in row.clips])
            loss = answer_loss(self.network, parts, clips, self.is_id, self.args.drop)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        elapsed = self.peers.average(self.parameters, elapsed + seconds)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.item(), elapsed

    def _save_and_report(self, step: int, elapsed: float) -> None:
        if self.peers.rank:
            return
        state = {
            "network": self.network.state_dict(),
            "sizes": asdict(self.network.sizes),
            "step": step,
            "elapsed": elapsed,
        }
        torch.save(state, self.folder / "new.pt")
        (self.folder / "new.pt").replace(self.folder / "last.pt")
        self.network.eval()
        shares = {name: share_right(self.network, self.examiner, rows) for name, rows in self.tests.items()}
        print("EVAL " + "  ".join(f"{name} {share:.1%}" for name, share in shares.items()), flush=True)


def work(rank: int, args: argparse.Namespace) -> None:
    """One process of a run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    PairTrainer(args, Peers(rank, args.processes, args.port)).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="pairs")
    parser.add_argument("--start", type=Path, required=True, help="the exported folder to continue from")
    parser.add_argument("--sets", nargs="+", default=["train", "pico"])
    parser.add_argument("--pool", type=int, default=40_000, help="clips that are encoded at the start")
    parser.add_argument("--rows", type=int, default=64, help="conversations in a batch")
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--drop", type=float, default=0.0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2, help="one per core")
    parser.add_argument("--port", type=int, default=29_518)
    args = parser.parse_args()
    multiprocessing.spawn(work, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
