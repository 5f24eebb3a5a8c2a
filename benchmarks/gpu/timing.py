"""How long a call takes on the device. On CUDA by its own events, elsewhere by the host's clock.

Callers bring several calls that do the same on different memory, together larger than any cache, as layers of a
model have memory of their own. They run in turn; the time of a call is that of a round over their number, the
median of the rounds. `launched` queues them one by one, as an eager step does, and shows the host where that is
slower than the device. `replayed` is a CUDA graph of a round: the device alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CACHE_BYTES = 512 << 20
"""More than any cache of a GPU, several times over."""
MAX_COPIES = 64
MIN_ROUNDS, MAX_ROUNDS = 5, 50
ROUND_BUDGET_S = 0.3
WARM_UP_ROUNDS = 2

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    launched: float
    replayed: float | None
    """None: not captured, see `note`."""
    note: str | None = None

    @property
    def best(self) -> float:
        """The device's time where it is known."""
        return self.launched if self.replayed is None else self.replayed

    def row(self) -> dict[str, float | str | None]:
        """For the document."""
        us = None if self.replayed is None else 1e6 * self.replayed
        return {"us": 1e6 * self.best, "launched_us": 1e6 * self.launched, "replayed_us": us, "note": self.note}


def num_copies(bytes_of_a_call: int, device: torch.device) -> int:
    """Working sets that no cache holds together. On a CPU two: it tries the code out."""
    return 2 if device.type == "cpu" else min(MAX_COPIES, max(2, math.ceil(CACHE_BYTES / max(1, bytes_of_a_call))))


def synchronise(device: torch.device) -> None:
    """Wait for all that is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def time_calls(calls: Sequence[Call], device: torch.device, *, capture: bool = True) -> Timing:
    """See the module's docstring. `capture`: whether the calls may be put into a CUDA graph."""

    def one_round() -> None:
        for call in calls:
            call()

    for _ in range(WARM_UP_ROUNDS):
        one_round()
    launched = _median_of_rounds(one_round, device) / len(calls)
    if device.type != "cuda" or not capture:
        return Timing(launched, None, None if device.type != "cuda" else "not captured")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one_round()
        return Timing(launched, _median_of_rounds(graph.replay, device) / len(calls))
    except RuntimeError as error:
        torch.cuda.synchronize(device)  # raises, if the device is lost
        return Timing(launched, None, f"not captured: {str(error).splitlines()[0][:200]}")


def _median_of_rounds(one_round: Call, device: torch.device) -> float:
    first = _seconds(one_round, device)
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(ROUND_BUDGET_S / max(first, 1e-9))))
    if device.type == "cpu":
        rounds = MIN_ROUNDS
    return statistics.median(_seconds(one_round, device) for _ in range(rounds))


def _seconds(function: Call, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
