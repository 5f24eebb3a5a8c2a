"""Train the bundled checkpoint: first the encoder alone on characters (CTC), then both towers on answers.

    python -m checkpoints.training.train --ctc-minutes 8 --minutes 80

The learning rate follows the clock, not a step count, so that a busy machine still ends on a finished
schedule. Continues from runs/NAME/last.pt when that exists; writes it every --save-every steps.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import distributed, multiprocessing
from torch.nn import functional as F

from checkpoints.training.batches import Batch, BatchMaker, ClipGroup, ClipStore, Rows
from checkpoints.training.listen import score_quickly
from checkpoints.training.network import Network, NetworkSizes
from checkpoints.training.prompts import PromptRenderer
from checkpoints.training.synthesise import CACHE

VALUE_WEIGHT = 6  # more than other tokens, for what follows "is": the value of a sum is one token in a hundred
Example = Batch | ClipGroup
RUNS = Path(__file__).parent / "runs"


def ctc_loss(network: Network, group: ClipGroup, frames: torch.Tensor) -> torch.Tensor:
    """The mean CTC loss per character of one group."""
    log_probs = network.ctc_log_probs(frames)
    lengths = torch.full((log_probs.shape[1],), log_probs.shape[0])
    losses = F.ctc_loss(
        log_probs, group.ctc_targets, lengths, group.ctc_lengths, reduction="none", zero_infinity=True
    )
    return (losses / group.ctc_lengths.clamp(min=4)).mean()


def joint_losses(network: Network, batch: Batch, drop: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(answer cross entropy, CTC) of one batch."""
    clips: list[torch.Tensor] = []
    ctc = torch.zeros(())
    for group in batch.groups:
        frames, pooled = network.audio_tower(group.mel, group.num_frames, drop)
        ctc = ctc + ctc_loss(network, group, frames) / len(batch.groups)
        clips += network.multi_modal_projector.linear(pooled).unbind(0)
    return answer_loss(network, batch.parts, dict(enumerate(clips)), batch.is_id, drop), ctc


def answer_loss(
    network: Network, parts: list[Rows], clips: Mapping[int, torch.Tensor], is_id: int, drop: float
) -> torch.Tensor:
    """Cross entropy of the answers in `parts` about clips whose projected rows are `clips`, [A, C] each."""
    states, wanted, weights = [], [], []
    nothing = torch.empty(0, network.sizes.width)
    for rows in parts:
        audio = torch.cat([nothing, *(clips[clip] for clip in rows.clips)])  # [N, C]
        x = network.embed(rows.token_ids, rows.is_audio, audio)
        states.append(network.language_model.model(x, (rows.answer_rows, rows.answer_columns), drop))
        wanted.append(rows.answer_ids)
        follows_is = rows.token_ids[rows.answer_rows, rows.answer_columns] == is_id
        weights.append(1 + VALUE_WEIGHT * follows_is)
    losses = F.cross_entropy(network.logits(torch.cat(states)).float(), torch.cat(wanted), reduction="none")
    weight = torch.cat(weights)
    return (losses * weight).sum() / weight.sum()


class Peers:
    """The processes of one run, one per core: each makes its own batches, gradients are averaged.

    On a CPU this keeps every core busy, where threads inside one process would wait for one another.
    """

    def __init__(self, rank: int, count: int, port: int) -> None:
        self.rank, self.count = rank, count
        address = f"tcp://127.0.0.1:{port}"
        distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=count)

    def average(self, parameters: list[torch.nn.Parameter], clock: float) -> float:
        """Average the gradients in place; returns the first process's clock."""
        wholes = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        own_clock = torch.tensor([clock if self.rank == 0 else 0.0])
        flat = torch.cat([own_clock, *(g.flatten() for g in wholes)])
        distributed.all_reduce(flat)
        sizes = [g.numel() for g in wholes]
        for parameter, grad in zip(parameters, flat[1:].div_(self.count).split(sizes), strict=True):
            parameter.grad = grad.view_as(parameter)
        return float(flat[0])


class Trainer:
    """Network, optimiser and clock of one run; `elapsed` counts over restarts."""

    def __init__(self, args: argparse.Namespace, peers: Peers) -> None:
        self.args, self.peers = args, peers
        self.folder = RUNS / args.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.network = Network(NetworkSizes())
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True
        )
        self.step, self.joint_steps, self.elapsed = 0, 0, 0.0
        if (self.folder / "last.pt").exists():
            self._load()
        self.renderer = PromptRenderer()
        self.seconds = args.seconds / peers.count
        store = ClipStore(CACHE, args.sets)
        self.say(f"{len(store)} clips, {sum(p.numel() for p in self.parameters) / 1e6:.2f} M parameters")
        self.maker = BatchMaker(store, self.renderer, seed=1000 + 100_000 * peers.rank + self.step)

    def say(self, text: str) -> None:
        if self.peers.rank == 0:
            print(text, flush=True)

    @property
    def is_joint(self) -> bool:
        return bool(self.elapsed >= 60 * self.args.ctc_minutes)

    def _make_example(self) -> Example:
        if self.is_joint:
            return self.maker.batch(self.seconds, easy=max(0.0, 1 - self.joint_steps / 300))
        return self.maker.group(self.seconds, sounds=0.03, easy=max(0.0, 1 - self.step / 600))

    def _load(self) -> None:
        state = torch.load(self.folder / "last.pt", weights_only=True)
        self.network.load_state_dict(state["network"])
        if state["optimizer"]:
            self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.joint_steps, self.elapsed = state["step"], state["joint_steps"], state["elapsed"]

    def save(self) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sizes": asdict(self.network.sizes),
            "step": self.step,
            "joint_steps": self.joint_steps,
            "elapsed": self.elapsed,
        }
        torch.save(state, self.folder / "new.pt")
        (self.folder / "new.pt").replace(self.folder / "last.pt")

    def learning_rate(self, joint: bool) -> float:
        start = 60 * self.args.ctc_minutes if joint else 0.0
        progress = min(1.0, max(0.0, self.elapsed - start) / (60 * self.args.minutes - start))
        warm = min(1.0, ((self.joint_steps if joint else self.step) + 1) / 120)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)) if joint else 1.0
        return float(self.args.lr * warm * decay)

    def run(self) -> None:
        mark, sums = time.monotonic(), [0.0, 0.0]
        while self.elapsed < 60 * self.args.minutes:
            now = time.monotonic()
            losses = self._one_step(now - mark)
            mark = now
            sums = [a + b for a, b in zip(sums, losses, strict=True)]
            if self.step % 25 == 0:
                rate = self.optimizer.param_groups[0]["lr"]
                self.say(
                    f"step {self.step} {self.elapsed / 60:.1f} min  answer {sums[0] / 25:.3f}"
                    f"  ctc {sums[1] / 25:.3f}  lr {rate:.2e}"
                )
                sums = [0.0, 0.0]
            if self.step % self.args.save_every == 0:
                self._save_and_report()
        self._save_and_report()

    def _one_step(self, seconds_since: float) -> tuple[float, float]:
        """One update; `seconds_since` the last one began. Returns the losses (answers, CTC)."""
        example = self._make_example()
        rate = self.learning_rate(isinstance(example, Batch))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        if isinstance(example, Batch):
            answer, ctc = joint_losses(self.network, example, self.args.drop)
            loss = answer + 0.5 * ctc
            self.joint_steps += 1
        else:
            frames, _ = self.network.audio_tower(example.mel, example.num_frames, self.args.drop)
            answer, ctc = torch.zeros(()), ctc_loss(self.network, example, frames)
            loss = ctc
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.elapsed = self.peers.average(self.parameters, self.elapsed + seconds_since)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        return answer.item(), ctc.item()

    def _save_and_report(self) -> None:
        if self.peers.rank:
            return
        self.save()
        self.network.eval()
        rates = score_quickly(self.network, self.renderer, CACHE, self.is_joint)
        self.say("EVAL " + "  ".join(f"{name} {rate:.1%}" for name, rate in rates.items()))


def work(rank: int, args: argparse.Namespace) -> None:
    """One process of a run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    Trainer(args, Peers(rank, args.processes, args.port)).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="main")
    parser.add_argument("--sets", nargs="+", default=["train"])
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--ctc-minutes", type=float, default=8)
    parser.add_argument("--seconds", type=float, default=40, help="of audio in a batch")
    parser.add_argument("--lr", type=float, default=1.6e-3)
    parser.add_argument("--drop", type=float, default=0.0)
    parser.add_argument("--save-every", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2, help="one per core")
    parser.add_argument("--port", type=int, default=29_517)
    args = parser.parse_args()
    multiprocessing.spawn(work, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
