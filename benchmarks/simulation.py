"""A fleet of replicas without a model: the real scheduler, a cost model for the device, simulated time. Torch-free.

A replica takes what is ready, plans a step with `engine.scheduler`, lets the time pass that the cost model names,
and gives the scheduler a token for each sequence that samples; then the next step. A request reaches a replica by
the router, and its scheduler after the front end has decoded its clips on one of a few cores.

While every running sequence decodes and nobody could be admitted, the plans of the next steps are known: until one
ends, blocks run out or a request arrives. Such steps are taken at once (`fast_forward`), which changes no result:
a test compares. Times are seconds from the start.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import random
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cost_model import CostModel, StepWork, work_of
from benchmarks.load_models import Load
from benchmarks.workload import Job, engine_request, text_id
from engine.answer import SampledToken
from engine.block_manager import BlockManager
from engine.encoder_cache import EncoderCache
from engine.plan import SchedulerOutput
from engine.prefix_cache import PrefixCache
from engine.scheduler import Scheduler
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """A replica's settings, under the engine's names."""

    max_num_seqs: int = 128
    max_num_batched_tokens: int = 1024
    long_prefill_token_threshold: int = 1024
    max_encoder_frames: int = 12_000
    encoder_cache_tokens: int = 16_384
    max_model_len: int = 8192
    kv_cache_tokens: int = 221_700
    block_size: int = 16
    enable_prefix_caching: bool = True

    def scheduler(self, frame_cost: float) -> Scheduler:
        """A fresh one. frame_cost: tokens that a mel frame counts as."""
        prefix_cache = PrefixCache(self.block_size) if self.enable_prefix_caching else None
        return Scheduler(
            BlockManager(self.kv_cache_tokens // self.block_size + 1, self.block_size, prefix_cache),
            EncoderCache(self.encoder_cache_tokens, row_bytes=1),
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_encoder_frames=self.max_encoder_frames,
            max_model_len=self.max_model_len,
            frame_cost=frame_cost,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
        )


@dataclass(frozen=True, slots=True)
class FrontCost:
    """The HTTP process of a replica: clips are decoded on `cores`, first come, first served."""

    cores: int = 8
    s_per_request: float = 0.002
    s_per_audio_second: float = 0.001

    def seconds(self, job: Job) -> float:
        """On one core."""
        return self.s_per_request + self.s_per_audio_second * sum(job.clip_seconds)


@dataclass(slots=True)
class Flight:
    """One request and what became of it."""

    job: Job
    replica: int
    sent: float
    sequence: Sequence | None = None
    ready: float = 0.0
    first_token: float | None = None
    last_token: float = 0.0
    num_tokens: int = 0
    worst_gap: float = 0.0


@dataclass(slots=True)
class Gaps:
    """Times between the tokens of requests: how long, how many of that length, and when they ended."""

    values: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def add(self, value: float, count: int, end: float) -> None:
        """`count` gaps of one length."""
        self.values.append(value)
        self.counts.append(count)
        self.ends.append(end)


class Router:
    """Which replica a request goes to."""

    POLICIES = ("round_robin", "least_loaded", "power_of_two", "conversation_hash")

    def __init__(self, policy: str, num_replicas: int, seed: int = 0) -> None:
        if policy not in self.POLICIES:
            raise ValueError(f"the router knows {', '.join(self.POLICIES)}, not {policy!r}")
        self.policy = policy
        self.in_flight = [0] * num_replicas
        self._turn = itertools.cycle(range(num_replicas))
        self._generator = random.Random(seed)

    def choose(self, job: Job) -> int:
        """-> a replica's number; the request counts as in flight there."""
        if self.policy == "round_robin":
            chosen = next(self._turn)
        elif self.policy == "conversation_hash":
            chosen = zlib.crc32(job.conversation.to_bytes(8, "little")) % len(self.in_flight)
        elif self.policy == "power_of_two":
            pair = [self._generator.randrange(len(self.in_flight)) for _ in range(2)]
            chosen = min(pair, key=self.in_flight.__getitem__)
        else:
            first = next(self._turn)  # equals take turns
            chosen = min(range(first, first + len(self.in_flight)), key=lambda n: self.in_flight[self._wrap(n)])
            chosen = self._wrap(chosen)
        self.in_flight[chosen] += 1
        return chosen

    def done(self, replica: int) -> None:
        """A request has ended."""
        self.in_flight[replica] -= 1

    def _wrap(self, number: int) -> int:
        return number % len(self.in_flight)


class Replica:
    """One engine and its front end."""

    def __init__(self, cost: CostModel, limits: Limits, front: FrontCost | None, fast_forward: bool) -> None:
        self.cost = cost
        self.scheduler = limits.scheduler(cost.frame_cost)
        self.front = front
        self.fast_forward = fast_forward
        self.flights: dict[str, Flight] = {}
        self.gaps = Gaps()
        self.busy_s = self.kv_usage_s = self.waiting_s = 0.0
        self.num_steps = 0
        self._inbox: list[Flight] = []
        self._cores = [0.0] * (front.cores if front else 1)
        self._plan: SchedulerOutput | None = None
        self._started = 0.0
        self._ends: list[float] = []
        """Of the steps under way: more than one when they were taken at once."""

    @property
    def end(self) -> float | None:
        """When the steps under way end. None: idle."""
        return self._ends[-1] if self._ends else None

    def ready_at(self, job: Job, now: float) -> float:
        """When the front end has prepared a request that arrives now."""
        if self.front is None:
            return now
        start = max(now, heapq.heappop(self._cores))
        heapq.heappush(self._cores, start + self.front.seconds(job))
        return start + self.front.seconds(job)

    def receive(self, flight: Flight, request_id: str, now: float) -> None:
        """A request is ready for the scheduler, which sees it when the step under way has ended."""
        flight.ready = now
        flight.sequence = Sequence(engine_request(flight.job, request_id), seed=0)
        self.flights[request_id] = flight
        self._inbox.append(flight)
        if len(self._ends) > 1:
            del self._ends[bisect.bisect_left(self._ends, now) + 1 :]

    def start(self, now: float) -> None:
        """Begin the next step, or many, if there is something to do."""
        for flight in self._inbox:
            assert flight.sequence is not None
            self.scheduler.add(flight.sequence)
        self._inbox.clear()
        self._ends = []
        self._plan = None
        if not self.scheduler.has_work:
            return
        self._started = now
        count = self._num_known_steps() if self.fast_forward else 0
        if count > 1:
            self._ends = self._decode_ends(now, count)
        else:
            self._plan = self.scheduler.schedule()
            self._ends = [now + self.cost.step_seconds(work_of(self._plan))]

    def finish(self) -> list[Flight]:
        """The steps under way are over. -> the requests that ended with them."""
        elapsed = self._ends[-1] - self._started
        self.busy_s += elapsed
        self.kv_usage_s += elapsed * self.scheduler.blocks.usage
        self.waiting_s += elapsed * len(self.scheduler.waiting)
        if self._plan is None:
            self._apply_known_steps()
            return []
        self.num_steps += 1
        sampled = {
            item.sequence.sequence_id: (SampledToken(text_id(self.flights[item.sequence.request_id].job)),)
            for item in self._plan.scheduled
            if item.samples
        }
        outputs = self.scheduler.update(self._plan, sampled)
        flights = [self.flights[output.request_id] for output in outputs]
        self._deliver(flights, self._ends[-1])
        return [self.flights.pop(output.request_id) for output in outputs if output.finish_reason is not None]

    def _num_known_steps(self) -> int:
        """Steps ahead that only decode, whatever their length: all but the one in which a sequence ends."""
        scheduler = self.scheduler
        running = scheduler.running
        if not 0 < len(running) <= scheduler.max_num_batched_tokens:
            return 0
        if any(sequence.num_missing_tokens != 1 for sequence in running):
            return 0
        if scheduler.waiting and len(running) < scheduler.max_num_seqs:
            return 0
        count = min(
            min(s.sampling.max_tokens - s.num_output_tokens, scheduler.max_model_len - s.num_tokens) for s in running
        )
        size = scheduler.blocks.block_size
        missing = sum(max(0, -(-(s.num_tokens + count) // size) - len(s.block_table)) for s in running)
        fits = missing <= (1.0 - scheduler.blocks.usage) * scheduler.blocks.num_usable_blocks
        return count - 1 if fits else 0

    def _decode_ends(self, now: float, count: int) -> list[float]:
        running = self.scheduler.running
        kv_tokens = sum(sequence.num_tokens for sequence in running)
        size = len(running)
        ends = []
        for step in range(count):
            work = StepWork(1, size, size, size, kv_tokens + step * size)
            now += self.cost.step_seconds(work)
            ends.append(now)
        return ends

    def _apply_known_steps(self) -> None:
        count, running = len(self._ends), self.scheduler.running
        flights = [self.flights[sequence.request_id] for sequence in running]
        self._deliver(flights, self._ends[0])
        for previous, end in itertools.pairwise(self._ends):
            self.gaps.add(end - previous, len(running), end)
        self._grow_tables(count)
        for sequence, flight in zip(running, flights, strict=True):
            sequence.token_ids += [text_id(flight.job)] * count
            sequence.num_computed_tokens += count
            self.scheduler.blocks.publish(sequence, sequence.num_computed_tokens)
            flight.num_tokens += count - 1
            flight.last_token = self._ends[-1]
        self.num_steps += count

    def _grow_tables(self, count: int) -> None:
        """Allocate what `count` steps would, in their order: it decides which cached blocks go."""
        blocks = self.scheduler.blocks
        size = blocks.block_size
        due = [
            (step, place, sequence)
            for place, sequence in enumerate(self.scheduler.running)
            for step in range(max(0, len(sequence.block_table) * size - sequence.num_tokens + 1), count, size)
        ]
        for step, _, sequence in sorted(due, key=lambda one: one[:2]):
            blocks.allocate(sequence, sequence.num_tokens + step)

    def _deliver(self, flights: list[Flight], now: float) -> None:
        """One token for each."""
        gaps: defaultdict[float, int] = defaultdict(int)
        for flight in flights:
            if flight.first_token is None:
                flight.first_token = now
            else:
                gap = now - flight.last_token
                flight.worst_gap = max(flight.worst_gap, gap)
                gaps[gap] += 1
            flight.last_token = now
            flight.num_tokens += 1
        for gap, count in gaps.items():
            self.gaps.add(gap, count, now)


class Fleet:
    """Replicas, a router, and the line of what happens next."""

    def __init__(
        self,
        cost: CostModel,
        limits: Limits,
        *,
        num_replicas: int = 1,
        router: str = "least_loaded",
        front: FrontCost | None = None,
        seed: int = 0,
        fast_forward: bool = True,
    ) -> None:
        self.replicas = [Replica(cost, limits, front, fast_forward) for _ in range(num_replicas)]
        self.router = Router(router, num_replicas, seed)
        self.done: list[Flight] = []
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    def run(self, load: Load) -> list[Flight]:
        """Until the last request has ended. -> all of them, in order of their ends."""
        self._load = load
        for at, job in load.first():
            self._at(at, self._send, job)
        while self._events:
            self.now, _, happen, arguments = heapq.heappop(self._events)
            happen(*arguments)
        assert not any(replica.flights for replica in self.replicas), "a request was lost"
        return self.done

    def _at(self, time: float, happen: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (time, next(self._order), happen, arguments))

    def _send(self, job: Job) -> None:
        number = self.router.choose(job)
        flight = Flight(job, number, self.now)
        self._at(self.replicas[number].ready_at(job, self.now), self._receive, flight)

    def _receive(self, flight: Flight) -> None:
        replica = self.replicas[flight.replica]
        before = replica.end
        replica.receive(flight, f"r{next(self._order)}", self.now)
        if before is None:
            self._start(flight.replica)
        elif replica.end != before:
            assert replica.end is not None
            self._at(replica.end, self._finish, flight.replica, replica.end)

    def _start(self, number: int) -> None:
        replica = self.replicas[number]
        replica.start(self.now)
        if replica.end is not None:
            self._at(replica.end, self._finish, number, replica.end)

    def _finish(self, number: int, end: float) -> None:
        replica = self.replicas[number]
        if replica.end != end:
            return  # it was cut short by an arrival
        for flight in replica.finish():
            self.router.done(number)
            self.done.append(flight)
            if following := self._load.after(flight.job, self.now):
                self._at(following[0], self._send, following[1])
        self._start(number)
