"""What would throughput and tail latency be? Simulated users on simulated replicas with the real scheduler.

    python -m benchmarks.simulator run --users 1000 --replicas 8      users who think between questions
    python -m benchmarks.simulator run --rate 12 --seconds 60         Poisson arrivals
    python -m benchmarks.simulator run --trace FILE                   what a server wrote with --log-json, or other
                                                                      recorded ones (JSON lines, see workload.py)
    python -m benchmarks.simulator capacity                           1 to 10,000 users on 1 to 64 replicas
    python -m benchmarks.simulator policy                             budgets; huge prompts among small ones
    python -m benchmarks.simulator calibrate FILE                     fit prices to the real engine on this machine
    python -m benchmarks.simulator check                              predict and measure the same loads here

`check` ends with status 1 where a prediction is off by more than a factor of AGREEMENT in throughput or in a mean.
A cost model is a name of cost_model.NAMED or a file that `calibrate` wrote. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.cost_model import LinearCost, Roofline, find_cost_model
from benchmarks.load_models import ClosedLoad, Load, OpenLoad
from benchmarks.policy_study import Study, print_row
from benchmarks.report import finish
from benchmarks.simulation import Fleet, FrontCost, Limits, Router
from benchmarks.summary import print_table, summarise
from benchmarks.workload import Mix, fixed_mix, poisson, read_trace
from engine.messages import EngineArgs
from tympan.load import percentiles

USERS = (1, 10, 100, 1_000, 10_000)
REPLICAS = (1, 4, 16, 64)
CHECKED = ((1, 2.0, 8), (1, 10.0, 6), (4, 2.0, 16), (4, 10.0, 12), (16, 2.0, 48), (16, 10.0, 32))
"""Concurrent users, seconds of each clip, requests."""
CHECK_TEXT_TOKENS, CHECK_OUTPUT_TOKENS = 50, 32
AGREEMENT = 1.5
"""By what factor a prediction may be off."""
FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "requests/s": lambda row: row["requests_per_s"],
    "TTFT mean": lambda row: row["ttft_s"]["mean"],
    "ITL mean": lambda row: row["inter_token_latency_s"]["mean"],
    "TTFT p50": lambda row: row["ttft_s"]["p50"],
    "ITL p50": lambda row: row["inter_token_latency_s"]["p50"],
    "ITL p95": lambda row: row["inter_token_latency_s"]["p95"],
}
HELD = ("requests/s", "TTFT mean", "ITL mean")
"""The figures that have to agree: a model without noise has no tails."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One load."""
    cost = find_cost_model(args.cost)
    limits = limits_of(args, cost)
    front = FrontCost(args.front_cores)
    fleet = Fleet(cost, limits, num_replicas=args.replicas, router=args.router, front=front, seed=args.seed)
    load: Load
    if args.trace:
        load = OpenLoad(read_trace(args.trace))
        window = None
    else:
        window = (args.warmup, args.seconds)
        if args.rate:
            load = OpenLoad(poisson(Mix(), args.rate, args.seconds, args.seed))
        else:
            load = ClosedLoad(
                Mix(), args.users, seconds=args.seconds, think_s=args.think, ramp_s=args.warmup, seed=args.seed
            )
    fleet.run(load)
    row = {"users": args.users, "replicas": args.replicas, **summarise(fleet, window)}
    print_table([row])
    return {"limits": describe_limits(limits), "rows": [row]}


def capacity(args: argparse.Namespace) -> dict[str, Any]:
    """Numbers of users against numbers of replicas."""
    cost = find_cost_model(args.cost)
    limits = limits_of(args, cost)
    rows = []
    for replicas in REPLICAS:
        for users in USERS:
            if users * 10 < replicas or users > 1000 * replicas:
                continue  # idle replicas, or lines of hours
            started = time.perf_counter()
            front = FrontCost(args.front_cores)
            fleet = Fleet(cost, limits, num_replicas=replicas, router=args.router, front=front, seed=args.seed)
            fleet.run(
                ClosedLoad(
                    Mix(), users, seconds=args.seconds, think_s=args.think, ramp_s=args.warmup, seed=args.seed
                )
            )
            row = {"users": users, "replicas": replicas, **summarise(fleet, (args.warmup, args.seconds))}
            rows.append({**row, "simulated_in_s": time.perf_counter() - started})
            print_table(rows[-1:], heading=len(rows) == 1)
    return {"limits": describe_limits(limits), "think_s": args.think, "rows": rows}


def policy(args: argparse.Namespace) -> dict[str, Any]:
    """What the defaults of the scheduler were chosen by."""
    cost = find_cost_model(args.cost)
    study = Study(cost, limits_of(args, cost), args.users, args.seconds, args.seed)
    rows = []
    for row in itertools.chain(study.budgets(), study.scenes()):
        print_row(row)
        rows.append(row)
    return {"limits": describe_limits(study.limits), "users": args.users, "rows": rows}


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Fit, and keep."""
    with tempfile.TemporaryDirectory() as scratch:
        cost = _calibration().fit(_engine_args(_checkpoint(args, Path(scratch))))
    cost.save(args.file)
    return {"file": str(args.file), "fitted": cost.fitted}


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Predict and measure."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = _checkpoint(args, Path(scratch))
        cost = find_cost_model(args.cost) if args.cost else _calibration().fit(_engine_args(folder))
        assert isinstance(cost, LinearCost)
        limits, rows = asyncio.run(_check(cost, folder, args.max_num_batched_tokens))
    _print_check(rows)
    return {"prices": cost.document(), "limits": describe_limits(limits), "rows": rows}


def predict(cost: LinearCost, limits: Limits, users: int, clip_seconds: float, requests: int) -> dict[str, Any]:
    """The figures of one load of CHECKED."""
    fleet = Fleet(cost, limits)
    fleet.run(_checked_load(users, clip_seconds, requests))
    return summarise(fleet, None)


def disagreements(rows: list[dict[str, Any]]) -> list[str]:
    """What of `check`'s rows is predicted too badly, in words."""
    found = []
    for row in rows:
        for name in HELD:
            predicted, measured = FIGURES[name](row["predicted"]), FIGURES[name](row["measured"])
            if not 1 / AGREEMENT <= predicted / measured <= AGREEMENT:
                at = f"{row['users']} users, {row['clip_seconds']:g} s"
                found.append(f"{name} at {at}: predicted {predicted:.3g}, measured {measured:.3g}")
    return found


async def _check(cost: LinearCost, folder: Path, budget: int | None) -> tuple[Limits, list[dict[str, Any]]]:
    calibration = _calibration()
    client = await calibration.ProcessEngineClient.start(_engine_args(folder, budget))
    info = client.info
    limits = Limits(info.max_num_seqs, info.max_num_batched_tokens, kv_cache_tokens=cost.kv_cache_tokens)
    rows = []
    await calibration.measure(client, folder, _checked_load(4, 2.0, 8, seed=1))
    for users, clip_seconds, requests in CHECKED:
        outcomes, wall = await calibration.measure(client, folder, _checked_load(users, clip_seconds, requests))
        measured = {
            "requests_per_s": requests / wall,
            "ttft_s": percentiles([outcome.ttft for outcome in outcomes]),
            "inter_token_latency_s": percentiles([gap for outcome in outcomes for gap in outcome.gaps]),
        }
        predicted = predict(cost, limits, users, clip_seconds, requests)
        load = {"users": users, "clip_seconds": clip_seconds, "requests": requests}
        rows.append({**load, "measured": measured, "predicted": predicted})
    await client.close()
    return limits, rows


def _print_check(rows: list[dict[str, Any]]) -> None:
    print("users clip  " + "  ".join(f"{name:>24}" for name in FIGURES))
    for row in rows:
        row["error"] = {name: pick(row["predicted"]) / pick(row["measured"]) - 1 for name, pick in FIGURES.items()}
        cells = [
            f"{pick(row['predicted']):8.4g} {pick(row['measured']):8.4g} {row['error'][name]:+6.1%}"
            for name, pick in FIGURES.items()
        ]
        print(f"{row['users']:5} {row['clip_seconds']:3.0f}s  " + "  ".join(f"{cell:>24}" for cell in cells))
    print("(each: predicted, measured, error)")


def _checked_load(users: int, clip_seconds: float, requests: int, seed: int = 0) -> ClosedLoad:
    mix = fixed_mix(clip_seconds, CHECK_TEXT_TOKENS, CHECK_OUTPUT_TOKENS)
    return ClosedLoad(mix, users, max_requests=requests, seed=1000 * seed + int(10 * clip_seconds) + users)


def _calibration() -> ModuleType:
    """It alone needs torch."""
    return importlib.import_module("benchmarks.calibration")


def _checkpoint(args: argparse.Namespace, scratch: Path) -> Path:
    if args.model:
        return args.model
    importlib.import_module("benchmarks.make_checkpoint").write_checkpoint(scratch, "small", "bfloat16")
    return scratch


def _engine_args(folder: Path, max_num_batched_tokens: int | None = None) -> EngineArgs:
    return EngineArgs(str(folder), device="cpu", max_num_batched_tokens=max_num_batched_tokens)


def limits_of(args: argparse.Namespace, cost: Roofline | LinearCost) -> Limits:
    """What the command line says, with the cache that the device has."""
    return Limits(
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        kv_cache_tokens=cost.kv_cache_tokens,
    )


def describe_limits(limits: Limits) -> dict[str, int]:
    """For the document."""
    return {name: getattr(limits, name) for name in Limits.__slots__}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path)
    simulated = argparse.ArgumentParser(add_help=False, parents=[shared])
    simulated.add_argument("--cost", default="h200-bf16")
    simulated.add_argument("--seed", type=int, default=0)
    simulated.add_argument("--seconds", type=float, default=60.0, help="nothing new is asked after that")
    simulated.add_argument("--warmup", type=float, default=20.0, help="users come during it; not counted")
    simulated.add_argument("--think", type=float, default=10.0, help="mean seconds between answer and question")
    simulated.add_argument("--router", choices=Router.POLICIES, default="least_loaded")
    simulated.add_argument("--front-cores", type=int, default=8, help="that decode clips, of each replica")
    simulated.add_argument("--max-num-seqs", type=int, default=Limits().max_num_seqs)
    simulated.add_argument("--max-num-batched-tokens", type=int, default=Limits().max_num_batched_tokens)
    one = commands.add_parser("run", parents=[simulated])
    one.add_argument("--users", type=int, default=100)
    one.add_argument("--replicas", type=int, default=1)
    one.add_argument("--rate", type=float, help="arrivals a second instead of users")
    one.add_argument("--trace", type=Path, help="recorded arrivals instead of either")
    commands.add_parser("capacity", parents=[simulated])
    commands.add_parser("policy", parents=[simulated]).add_argument("--users", type=int, default=96)
    real = argparse.ArgumentParser(add_help=False, parents=[shared])
    real.add_argument("--model", type=Path, help="a checkpoint's folder; default: random weights, `small`")
    commands.add_parser("calibrate", parents=[real]).add_argument("file", type=Path)
    both = commands.add_parser("check", parents=[real])
    both.add_argument("--cost", help="default: calibrate first")
    both.add_argument("--max-num-batched-tokens", type=int, help="default: the engine's")
    return parser.parse_args()


def main() -> None:
    """Command line."""
    args = _parse()
    commands = {"run": run, "capacity": capacity, "policy": policy, "calibrate": calibrate, "check": check}
    result = commands[args.command](args)
    finish({"benchmark": f"simulator {args.command}", "cost": getattr(args, "cost", None), **result}, args.output)
    if args.command == "check" and (found := disagreements(result["rows"])):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
