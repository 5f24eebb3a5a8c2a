"""Benchmarks of the whole program on one GPU.

    python -m benchmarks.gpu all --out benchmarks/results/gpu/all.json [--seconds 1500]
    python -m benchmarks.gpu steps --out FILE                             one part, or several
    python -m benchmarks.gpu all --tiny --device cpu --out FILE           the same code on a CPU, in a minute

Weights are random and made on the device. Parts run in processes of their own, most valuable first, and every
figure is in FILE as soon as it is there. Started again on the same FILE it goes on where it was: what has a figure
is kept, the rest is tried again (`--fresh` begins at nothing). The bar is printed, and is in the document.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import bar
from benchmarks.gpu.driver import ROOT, Document, run_all
from benchmarks.gpu.parts import PARTS, Part, find_part

DEFAULT_OUT = Path("benchmarks/results/gpu/all.json")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parts = "\n".join(f"  {part.name:14}{part.what}" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=f"{__doc__}\nparts, in the order of all:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="+", choices=["all", *(part.name for part in PARTS)], metavar="PART")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default: {DEFAULT_OUT}")
    parser.add_argument("--seconds", type=float, default=1800, help="budget of all parts together; default: 1800")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two narrow layers and loads to match")
    parser.add_argument("--fresh", action="store_true", help="do not go on with what FILE has")
    parser.add_argument("--plan", action="store_true", help="say what it will take, and do nothing")
    return parser.parse_args(arguments)


def machine() -> dict[str, Any]:
    """Hardware and versions, asked for in another process: here nothing takes memory of the device."""
    command = [sys.executable, "-m", "benchmarks.gpu.worker", "facts"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def main() -> int:
    """-> exit status: 1 if a part did not come to its end, or a cell of it failed."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # unwinds, which ends the part
    wanted = PARTS if "all" in args.parts else tuple(find_part(name) for name in args.parts)
    shape = "tiny" if args.tiny else "7b"
    facts = {**machine(), "benchmark": "gpu", "shape": shape, "device": args.device}
    facts["command"] = f"python -m benchmarks.gpu {' '.join(args.parts)}"
    if args.device == "cuda" and not facts["hardware"]["gpu"]:
        sys.exit("torch sees no CUDA device here; --tiny --device cpu tries the code out without one")
    if args.plan:
        print(plan(wanted, args.seconds, facts["hardware"]["gpu"] or args.device, args.out))
        return 0
    document = Document(args.out.resolve(), facts, bar.add_to)
    if not args.fresh:
        document.resume()

    def child(part: Part, journal: Path) -> list[str]:
        return [sys.executable, "-m", "benchmarks.gpu.worker", part.name, str(journal), shape, args.device]

    done = run_all(wanted, document, child, args.seconds)
    return report(document.content, wanted, done)


def plan(wanted: Sequence[Part], seconds: float, device: str, out: Path) -> str:
    """What the parts will take."""
    most = min(seconds, sum(part.limit_s for part in wanted))
    lines = [f"benchmarks on {device}, {most / 60:.0f} minutes at most, most valuable first, into {out}:"]
    lines += [f"{part.limit_s:7g} s  {part.name:14}{part.what}" for part in wanted]
    lines.append("Nothing is downloaded. Whatever else runs on the device makes the figures worse.")
    return "\n".join(lines)


def report(document: dict[str, Any], wanted: Sequence[Part], done: bool) -> int:
    """For people. -> exit status."""
    failed = 0
    for part in wanted:
        content = document["parts"][part.name]
        cells = content.get("cells", [])
        print(f"{content['outcome']:12} {content.get('took_s', 0):6.0f} s  {part.name}: {len(cells)} cells")
        for cell in cells:
            for kind in ("error", "skipped"):
                if kind in cell:
                    print(f"    {kind}: {cell['cell']}: {cell[kind].splitlines()[0]}")
            failed += "error" in cell
    for line in bar.evaluate(document):
        print(line)
    return 0 if done and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
