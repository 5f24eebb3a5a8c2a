"""A process of one part: `python -m benchmarks.gpu.worker PART JOURNAL SHAPE DEVICE`. The driver starts it.

`python -m benchmarks.gpu.worker facts` prints what the machine is, so that the driver never touches the device.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.parts import find_part
from benchmarks.gpu.shapes import SHAPES
from benchmarks.make_checkpoint import write_configuration
from benchmarks.report import describe


def main(words: list[str]) -> None:
    """All cells that the journal lacks. Exits with `journal.BEGIN_ANEW` when the device is lost."""
    if words == ["facts"]:
        print(json.dumps(describe()))
        return
    name, journal, shape, device = words
    module, function = find_part(name).function.split(".")
    measure = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    with tempfile.TemporaryDirectory() as folder:
        write_configuration(Path(folder), SHAPES[shape].size, "bfloat16")
        measure(Journal(Path(journal)), SHAPES[shape], torch.device(device), Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
