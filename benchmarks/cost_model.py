"""What a step costs, from its plan alone: the simulator's stand-in for a device. Torch-free.

`work_of` counts what a plan makes the device do; a cost model turns the counts into seconds. There are two kinds: a
`Roofline` follows from a device's figures and the model's shape, a `LinearCost` was fitted to measured steps
(benchmarks/calibration.py). Neither knows requests, users or time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from engine.plan import SchedulerOutput
from model.config import num_conv_frames, num_mel_frames


class StepWork(NamedTuple):
    """Counts of one step."""

    num_steps: int = 1
    num_tokens: int = 0
    """Rows that the decoder computes."""
    num_sampled: int = 0
    """Rows of logits."""
    num_sequences: int = 0
    kv_tokens: int = 0
    """Cached positions read, over all sequences."""
    attention_pairs: int = 0
    """Queries times keys of the chunks longer than one token, causal."""
    num_clips: int = 0
    encoder_frames: int = 0
    """Of 20 ms: rows that the encoder computes."""
    encoder_pairs: int = 0
    """Frames squared, summed over the clips."""


def work_of(plan: SchedulerOutput) -> StepWork:
    """Count what a plan asks for."""
    frames = [num_conv_frames(num_mel_frames(len(clip.samples))) for clip in plan.clips_to_encode]
    chunks = [(item.start, item.num_tokens) for item in plan.scheduled]
    return StepWork(
        num_tokens=sum(count for _, count in chunks),
        num_sampled=sum(item.samples for item in plan.scheduled),
        num_sequences=len(chunks),
        kv_tokens=sum(start + count for start, count in chunks),
        attention_pairs=sum(count * start + count * (count + 1) // 2 for start, count in chunks if count > 1),
        num_clips=len(frames),
        encoder_frames=sum(frames),
        encoder_pairs=sum(count * count for count in frames),
    )


class CostModel(Protocol):
    """Seconds for work."""

    @property
    def frame_cost(self) -> float:
        """Tokens that a mel frame counts as: see model.config.Qwen2AudioConfig.frame_cost."""
        ...

    def step_seconds(self, work: StepWork) -> float:
        """How long the step takes, from its plan to its tokens on the host."""
        ...


@dataclass(frozen=True, slots=True)
class Roofline:
    """A GPU: matrices take what is longer, reading them or multiplying; the cache is read on top. SI units."""

    bandwidth: float
    flops: float
    body_parameters: float
    head_parameters: float
    encoder_parameters: float
    attention_width: int
    """Decoder layers times the width of all heads."""
    encoder_attention_width: int
    kv_bytes_per_token: float
    kv_cache_tokens: int
    """What fits in memory beside the weights."""
    bytes_per_parameter: float = 2.0
    bandwidth_share: float = 1.0
    """Of `bandwidth`, reached in practice."""
    matmul_share: float = 1.0
    """Of `flops`, in the decoder's matrices."""
    attention_share: float = 1.0
    encoder_share: float = 1.0
    small_kernels_s: float = 0.0
    """Norms, rotations, sampling: of every step, and of every row."""
    small_kernels_s_per_row: float = 0.0
    launch_s: float = 0.0
    """A step that no captured graph covers (one with a chunk) lasts at least as long as its launches."""
    host_s: float = 0.0
    """Scheduling and input building; overlapped with the device, so it shows only where it is the longer."""
    host_s_per_sequence: float = 0.0

    @property
    def frame_cost(self) -> float:
        """See CostModel."""
        return self.encoder_parameters / 2 / self.body_parameters

    def step_seconds(self, work: StepWork) -> float:
        """See CostModel."""
        bandwidth, matmul = self.bandwidth * self.bandwidth_share, self.flops * self.matmul_share
        device = self._matrix(self.body_parameters, work.num_tokens, bandwidth, matmul)
        device += self._matrix(self.head_parameters, work.num_sampled, bandwidth, matmul)
        device += work.kv_tokens * self.kv_bytes_per_token / bandwidth
        device += 4 * self.attention_width * work.attention_pairs / (self.flops * self.attention_share)
        if work.num_clips:
            encoder = self.flops * self.encoder_share
            device += self._matrix(self.encoder_parameters, work.encoder_frames, bandwidth, encoder)
            device += 4 * self.encoder_attention_width * work.encoder_pairs / encoder
        device += self.small_kernels_s + self.small_kernels_s_per_row * work.num_tokens
        host = self.host_s + self.host_s_per_sequence * work.num_sequences
        return max(device, host, self.launch_s if work.num_tokens > work.num_sequences else 0.0)

    def _matrix(self, parameters: float, rows: int, bandwidth: float, flops: float) -> float:
        if rows == 0:
            return 0.0
        return max(parameters * self.bytes_per_parameter / bandwidth, 2 * parameters * rows / flops)


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds for each count of StepWork, as fitted. `num_steps` is what a step costs in any case."""

    seconds: tuple[float, ...]
    """In the order of StepWork's fields."""
    fitted: str = ""
    """On what."""
    kv_cache_tokens: int = 65_536
    frame_cost: float = 0.0
    """See CostModel."""

    def step_seconds(self, work: StepWork) -> float:
        """See CostModel."""
        return sum(count * price for count, price in zip(work, self.seconds, strict=True))

    def document(self) -> dict[str, Any]:
        """For JSON, each price under its count's name."""
        return {**asdict(self), "seconds": dict(zip(StepWork._fields, self.seconds, strict=True))}

    @classmethod
    def from_document(cls, raw: dict[str, Any]) -> LinearCost:
        """What `document` gave. Raises ValueError."""
        known = {field.name for field in fields(cls)}
        if raw.keys() != known or raw["seconds"].keys() != set(StepWork._fields):
            raise ValueError(f"no cost model: a fitted one has {known} and a price for each of {StepWork._fields}")
        return cls(**{**raw, "seconds": tuple(raw["seconds"][count] for count in StepWork._fields)})

    def save(self, path: Path) -> None:
        """As a file of JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.document(), indent=2) + "\n", encoding="utf-8")


H200_BF16_FLOOR = Roofline(
    bandwidth=4.3e12,
    flops=780e12,
    body_parameters=6.477e9,
    head_parameters=0.639e9,
    encoder_parameters=0.637e9,
    attention_width=32 * 4096,
    encoder_attention_width=32 * 1280,
    kv_bytes_per_token=2 * 32 * 32 * 128 * 2,
    kv_cache_tokens=221_700,
)
"""Qwen2-Audio-7B on one H200 if everything ran at the measured limits of the card."""

H200_BF16 = replace(
    H200_BF16_FLOOR,
    bandwidth_share=0.85,
    matmul_share=0.65,
    attention_share=0.45,
    encoder_share=0.5,
    small_kernels_s=0.33e-3,
    small_kernels_s_per_row=1.5e-6,
    launch_s=4e-3,
    host_s=1e-3,
    host_s_per_sequence=20e-6,
)
"""The same at the shares that good kernels reach. No figure of it has been measured with this engine."""

NAMED = {"h200-bf16": H200_BF16, "h200-bf16-floor": H200_BF16_FLOOR}


def find_cost_model(name: str) -> Roofline | LinearCost:
    """A name of NAMED, or a file that `LinearCost.save` wrote. Raises OSError, ValueError."""
    if name in NAMED:
        return NAMED[name]
    try:
        return LinearCost.from_document(json.loads(Path(name).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
