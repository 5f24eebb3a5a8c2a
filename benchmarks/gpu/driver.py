"""Runs parts one after the other, each in a process of its own, within a budget of time.

The document is written whenever a cell has ended, so nothing is lost when the driver itself is killed. Started
again on the same document it goes on: cells with a figure are kept, everything else is tried again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import BEGIN_ANEW, read_cells
from benchmarks.gpu.parts import Part

ROOT = Path(__file__).resolve().parent.parent.parent
POLL_S = 0.2
END_LIMIT_S = 10.0
MAX_STARTS = 12
"""Of one part: each but the first follows a cell that has ended its process."""


@dataclass
class Run:
    """One part under way."""

    part: Part
    command: list[str]
    journal: Path
    deadline: float
    changed: Callable[[list[dict[str, Any]]], None]
    """Called with all cells whenever there are new ones."""

    def go(self) -> str:
        """-> done, out of time, or failed."""
        for _ in range(MAX_STARTS):
            num_before = len(read_cells(self.journal))
            status = self._one_process()
            self.changed(read_cells(self.journal))
            if status == 0:
                return "done"
            if status is None:
                return "out of time"
            if len(read_cells(self.journal)) == num_before:
                return "failed"
        return "failed"

    def _one_process(self) -> int | None:
        """-> its exit status, `BEGIN_ANEW` where a cell took too long, None when time is up."""
        process = subprocess.Popen(self.command, cwd=ROOT, stdout=sys.stderr, start_new_session=True)
        try:
            size, written = -1, time.monotonic()
            while process.poll() is None:
                now = time.monotonic()
                if now > self.deadline:
                    return None
                if now - written > self.part.cell_limit_s:
                    print(f"   {self.part.name}: a cell took more than {self.part.cell_limit_s} s", file=sys.stderr)
                    return BEGIN_ANEW
                if (now_size := _size(self.journal)) != size:
                    size, written = now_size, now
                    self.changed(read_cells(self.journal))
                time.sleep(POLL_S)
            return process.returncode
        finally:
            _end(process)


class Document:
    """The JSON file: facts of the run, the parts and their cells, and what `finish` makes of the figures."""

    def __init__(
        self, path: Path, facts: dict[str, Any], finish: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        self._path = path
        self._finish = finish
        self.content: dict[str, Any] = {**facts, "parts": {}}

    def resume(self) -> None:
        """Keep the figures that the file has, if it is of the same shape and device."""
        if self._path.exists():
            before = json.loads(self._path.read_text(encoding="utf-8"))
            if all(before.get(name) == self.content[name] for name in ("shape", "device")):
                self.content["parts"] = before["parts"]

    def cells(self, name: str) -> list[dict[str, Any]]:
        """Of a part, those with figures."""
        return [cell for cell in self.content["parts"].get(name, {}).get("cells", []) if "row" in cell]

    def put(self, name: str, **fields: Any) -> None:
        """Change a part, and write the file: whole or not at all."""
        self.content["parts"].setdefault(name, {}).update(fields)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".part")
        scratch.write_text(json.dumps(self._finish(self.content), indent=1) + "\n", encoding="utf-8")
        scratch.replace(self._path)


def run_all(
    parts: Sequence[Part], document: Document, child: Callable[[Part, Path], list[str]], seconds: float
) -> bool:
    """`child`: the command that runs a part, given its journal. -> whether every part is done."""
    end = time.monotonic() + seconds
    for part in parts:
        left = end - time.monotonic()
        if left < 1:
            if document.content["parts"].get(part.name, {}).get("outcome") != "done":
                document.put(part.name, outcome="not begun: the time was up")
            continue
        print(f"== {part.name}, {left:.0f} s left", file=sys.stderr, flush=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            journal = Path(scratch) / "cells.jsonl"
            journal.write_text("".join(json.dumps(cell) + "\n" for cell in document.cells(part.name)), "utf-8")
            run = Run(
                part,
                child(part, journal),
                journal,
                started + min(part.limit_s, left),
                lambda cells, name=part.name: document.put(name, cells=cells),
            )
            document.put(part.name, outcome="under way")
            outcome = run.go()
        document.put(part.name, outcome=outcome, took_s=round(time.monotonic() - started, 1))
    return all(document.content["parts"][part.name]["outcome"] == "done" for part in parts)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it has started, which are in its session."""
    for number, limit_s in ((signal.SIGTERM, END_LIMIT_S), (signal.SIGKILL, END_LIMIT_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            continue
