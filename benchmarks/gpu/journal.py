"""The cells of one part of the benchmarks, written one by one as they end.

A cell is one measurement with a name. What raises is told in its place and the next one goes on. A process that a
GPU has poisoned (after an illegal access every call fails) exits with `BEGIN_ANEW`; started again with the same
journal, it skips what is settled. A cell that had begun and never ended killed its process, or hung until it was
killed: it is settled too, so nothing is tried twice.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

BEGIN_ANEW = 75
"""Exit status: the rest has to run in a new process."""

ERROR_LINES = 6
POISONED = (
    "CUDA error",
    "CUDA driver error",
    "misaligned address",
    "illegal memory access",
    "unspecified launch failure",
)

T = TypeVar("T")


class Unavailable(Exception):
    """What would be measured is not there; the message says why. No failure."""


class Journal:
    """A file of JSON lines: `began`, then `row`, `error` or `skipped`, each with the cell's name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._settled = {cell["cell"] for cell in read_cells(path)}

    def cell(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Measure and keep what comes back, unless this is settled. -> it."""
        return None if name in self._settled else self._run(name, measure, dict)

    def attempt(self, name: str, make: Callable[[], T], facts: Callable[[T], dict[str, Any]]) -> T | None:
        """Make what several cells need, and keep `facts` of it. Made again in a new process, unless that failed."""
        failed = {cell["cell"] for cell in read_cells(self._path) if "row" not in cell}
        return None if name in failed else self._run(name, make, facts)

    def lacks(self, names: Iterable[str]) -> bool:
        """Whether any of these cells is still to be measured."""
        return not self._settled.issuperset(names)

    def _run(self, name: str, make: Callable[[], T], facts: Callable[[T], dict[str, Any]]) -> T | None:
        print(f"   {name}", file=sys.stderr, flush=True)
        self._write({"cell": name, "began": time.time()})
        self._settled.add(name)
        started = time.perf_counter()
        try:
            made = make()
            row = facts(made)
        except Unavailable as reason:
            self._write({"cell": name, "skipped": str(reason)})
        except Exception as error:
            traceback.print_exc()
            self._write({"cell": name, "error": _describe(error)})
            if is_poisoned(error):
                sys.exit(BEGIN_ANEW)
        else:
            self._write({"cell": name, "row": row, "took_s": time.perf_counter() - started})
            return made
        return None

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The last word on every cell, in the order in which they began."""
    cells: dict[str, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a process was killed while it wrote this
        if "began" in entry:
            entry = {"cell": entry["cell"], "error": "the process ended, or was ended, in this cell"}
        cells[entry["cell"]] = entry
    return list(cells.values())


def is_poisoned(error: BaseException) -> bool:
    """Whether the device will refuse all that follows in this process. Memory that ran out does not poison."""
    text = str(error)
    return "out of memory" not in text and any(sign in text for sign in POISONED)


def _describe(error: BaseException) -> str:
    lines = f"{type(error).__name__}: {error}".splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (in {Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return "\n".join(lines[:ERROR_LINES]) + where
