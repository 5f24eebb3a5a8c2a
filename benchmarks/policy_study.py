"""The simulator's experiments on scheduling policy: budgets, and huge prompts among small ones. Torch-free.

Every row is one replica for a while, under users who keep it busy. `budgets` varies one limit at a time; `scenes`
adds prompts of 8,000 tokens, or a file in windows, to small questions, with and without the long lane.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.cost_model import CostModel
from benchmarks.load_models import ClosedLoad, Load, Together
from benchmarks.simulation import Fleet, FrontCost, Limits
from benchmarks.summary import latencies, summarise
from benchmarks.workload import Mix, fixed_mix

VARIED = {
    "max_num_batched_tokens": (256, 512, 1024, 2048, 4096),
    "max_num_seqs": (32, 64, 128, 256),
    "max_encoder_frames": (3000, 6000, 12_000, 24_000),
}
HUGE = fixed_mix(0.1, 8000, 32)
WINDOW = fixed_mix(30.0, 50, 100)
SCENES = {"small alone": (0, HUGE), "1 huge": (1, HUGE), "4 huge": (4, HUGE), "a file in windows": (16, WINDOW)}
"""How many at once beside the small ones: of text of 8,000 tokens, or of 30 s as a transcription sends them."""
THRESHOLDS = (0, 512, 1024, 2048)
WARMUP_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Study:
    """On what, and how long."""

    cost: CostModel
    limits: Limits
    users: int
    seconds: float
    seed: int = 0

    def budgets(self) -> Iterator[dict[str, Any]]:
        """One limit at a time; so many requests as there are users are always in flight."""
        for name, values in VARIED.items():
            for value in values:
                row = self._row(replace(self.limits, **{name: value}), {"small": self._small(0.0)})
                yield {"limit": name, "value": value, **row}

    def scenes(self) -> Iterator[dict[str, Any]]:
        """Whether small ones suffer from huge ones, and what it costs to spare them. Users think for 2 s."""
        for scene, (count, mix) in SCENES.items():
            for threshold in THRESHOLDS if count else (0,):
                loads: dict[str, Load] = {"small": self._small(2.0)}
                if count:
                    loads["huge"] = ClosedLoad(mix, count, seconds=self.seconds, seed=self.seed + 1)
                limits = replace(self.limits, long_prefill_token_threshold=threshold)
                yield {"limit": scene, "value": threshold, **self._row(limits, loads)}

    def _small(self, think_s: float) -> ClosedLoad:
        return ClosedLoad(Mix(), self.users, seconds=self.seconds, think_s=think_s, ramp_s=1.0, seed=self.seed)

    def _row(self, limits: Limits, loads: dict[str, Load]) -> dict[str, Any]:
        fleet = Fleet(self.cost, limits, front=FrontCost(), seed=self.seed)
        fleet.run(Together(loads))
        start = WARMUP_SHARE * self.seconds
        counted = [flight for flight in fleet.done if flight.sent >= start]
        by_kind = {kind: latencies([one for one in counted if one.job.kind == kind]) for kind in loads}
        return {**summarise(fleet, (start, self.seconds)), **by_kind}


def print_row(row: dict[str, Any]) -> None:
    """For people."""

    def ms(figures: dict[str, float | None]) -> str:
        return "/".join(f"{1000 * (figures[key] or 0):.0f}" for key in ("p50", "p95", "p99"))

    huge = (
        f"  huge: TTFT {ms(row['huge']['ttft_s'])}, whole {ms(row['huge']['end_to_end_s'])}" if "huge" in row else ""
    )
    rates = f"{row['requests_per_s']:6.2f} req/s {row['output_tokens_per_s']:6.0f} tok/s"
    small = f"small: TTFT {ms(row['small']['ttft_s']):>16}, longest gap {ms(row['small']['worst_gap_s']):>14}"
    gaps = f"ITL {ms(row['inter_token_latency_s']):>12}"
    print(f"{row['limit']:>22} {row['value']:>6}  {rates}  {small}  {gaps}{huge}", flush=True)
