"""The CPU set: every benchmark that a machine without a GPU can run, in less than 15 minutes, and the picture.

    python -m benchmarks.cpu_set [--only NAME ...] [--results benchmarks/results/cpu] [--picture docs/images/cpu.png]

Each part is a process with a time limit, one after the other; adding one is a line of `PARTS`. A part that fails or
runs out of time is told and the others go on; then the exit status is 1. Only a peer that is not installed may be
skipped, which its part's document says. `set.json` tells what ran, for how long, and the bar.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import finish
from benchmarks.servers import ROOT, end_tree

BUDGET_S = 15 * 60
PICTURE = Path("docs/images/cpu.png")


@dataclass(frozen=True)
class Part:
    """One benchmark: its module in `benchmarks` with arguments, and the seconds that it may take."""

    name: str
    command: str
    limit_s: int


PARTS = (
    Part("compare", "compare", 520),
    Part("long_file", "long_file --minutes 3", 40),
    Part("conversation", "conversation --conversations 2", 50),
    Part("speculation", "speculation speech --min 1", 30),
    Part("front", "front health --seconds 20", 60),
    Part("front_clips", "front clips --requests 200", 70),
    Part("host_time", "host_time --steps 100", 30),
    Part("simulation", "simulator check", 100),
)


def run_part(part: Part, output: Path, extra: list[str]) -> dict[str, Any]:
    """-> name, outcome (done, failed, out of time), seconds, and what its document says it skipped."""
    command = [sys.executable, "-m", *f"benchmarks.{part.command}".split(), *extra, "--output", str(output)]
    written = ROOT / output
    written.unlink(missing_ok=True)
    print(f"== {part.name}: python {' '.join(command[1:])}", file=sys.stderr)
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    try:
        outcome = "failed" if process.wait(part.limit_s) or not written.exists() else "done"
    except subprocess.TimeoutExpired:
        outcome = "out of time"
    finally:
        end_tree(process)
    skipped = json.loads(written.read_text(encoding="utf-8")).get("skipped", []) if outcome == "done" else []
    row = {"name": part.name, "outcome": outcome, "took_s": time.perf_counter() - started}
    return {**row, "limit_s": part.limit_s, "skipped": skipped}


def draw(comparison: Path, picture: Path) -> None:
    """In a process of its own: here nothing imports matplotlib. The README's picture brings its table along."""
    command = [sys.executable, "-m", "benchmarks.picture", str(comparison), str(picture)]
    command += ["README.md"] if picture == PICTURE else []
    subprocess.run(command, cwd=ROOT, check=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/cpu"), help="in the repository")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="in the repository")
    parser.add_argument("--compare", default="", help="more options for benchmarks.compare, in one string")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # unwinds, which ends the part
    wanted = [part for part in PARTS if not args.only or part.name in args.only]
    rows = []
    for part in wanted:
        extra = args.compare.split() if part.name == "compare" else []
        rows.append(run_part(part, args.results / f"{part.name}.json", extra))
    bar = []
    if any(row["name"] == "compare" and row["outcome"] == "done" for row in rows):
        comparison = args.results / "compare.json"
        bar = json.loads((ROOT / comparison).read_text(encoding="utf-8"))["bar"]
        draw(comparison, args.picture)
    for row in rows:
        print(
            f"{row['outcome']:12} {row['took_s']:6.0f} s  {row['name']} {' '.join(row['skipped'])}", file=sys.stderr
        )
    finish({"benchmark": "cpu_set", "parts": rows, "bar": bar}, ROOT / args.results / "set.json")
    sys.exit(any(row["outcome"] != "done" for row in rows))


if __name__ == "__main__":
    main()
