"""What py-spy sampled, as a table small enough to keep: shares of a step by function.

py-spy record -F -r 400 -f raw -o step.raw -- python -m benchmarks.host_time --steps 600
python -m benchmarks.profile_table step.raw --under time_steps > docs/profiles/host_step.txt
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

ROWS = 45


def table(lines: list[str], under: str) -> str:
    """Functions called below `under`, with what they took in all and by themselves, most first."""
    whole, own, samples = Counter[str](), Counter[str](), 0
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        start = next((place for place, frame in enumerate(frames) if frame.split(" ")[0] == under), None)
        if start is None:
            continue
        below = [frame for frame in frames[start + 1 :] if "Stopwatch" not in frame]
        if not below:
            continue
        samples += int(count)
        own[below[-1]] += int(count)
        for frame in set(below):
            whole[frame] += int(count)
    rows = [f"{100 * whole[frame] / samples:6.1f} {100 * own[frame] / samples:6.1f}  {frame}" for frame in whole]
    head = f"{samples} samples below {under}; % with callees, % alone, function"
    return "\n".join([head, *sorted(rows, reverse=True)[:ROWS]])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="what py-spy wrote with -f raw")
    parser.add_argument("--under", default="time_steps", help="leave out what is not called by this function")
    args = parser.parse_args()
    print(table(args.raw.read_text(encoding="utf-8").splitlines(), args.under))


if __name__ == "__main__":
    main()
