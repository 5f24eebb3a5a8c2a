"""Everything that crosses between the HTTP process and the engine process: frozen values, no behaviour.

Texts never cross: prompts arrive as token ids, answers leave as token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray


class FinishReason(StrEnum):
    """Why a request ended. STOP and LENGTH are OpenAI's words; ABORT is never sent to anybody."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Ranges are checked where requests enter (server/requests/schema.py)."""

    max_tokens: int
    """At least 1. The caller has fitted it to the context."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are not sampled before so many tokens."""
    temperature: float = 1.0
    """0: greedy."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output (Keskar et al. 2019, as in transformers)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """These two over the output only, as OpenAI defines them."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    """int64. The same seed gives the same answer whoever shares the batch."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the answer, end-of-sequence ids included unless the request ignores them."""
    logprobs: int | None = None
    """None: none. n >= 0: the sampled token's, and the n best's, before temperature and penalties."""
    grammar: str | None = None
    """What the answer must match, as llguidance serializes it (server/structured/ makes it). None: anything."""


@dataclass(frozen=True, slots=True)
class AudioClip:
    """One clip, and where its embeddings go in the prompt."""

    samples: NDArray[np.float32]
    """[S], mono, 16 kHz, at most 30 s."""
    content_hash: str
    """Equal hash, equal samples: the key of the encoder cache."""
    offset: int
    """Index in the prompt of its first placeholder token."""
    num_tokens: int
    """Placeholder tokens: `model.config.num_audio_tokens(S)`."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request as the engine sees it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    """Audio placeholders already expanded: one id for each position."""
    sampling: SamplingParams
    clips: tuple[AudioClip, ...] = ()
    """In order of offset, not overlapping."""
    n: int = 1
    """Choices: answers to the one prompt, each with a seed of its own. Choice 0 is what n=1 gives."""
    priority: int = 0
    """Lower goes first; equals in order of arrival."""
    cache_salt: str | None = None
    """Only requests with the same salt share what is computed of their prompts."""
    time_limit_s: float | None = None
    """From submission to the last output; kept by the client. None: no limit."""


SequenceId = tuple[str, int]
"""A request's id and the index of one of its choices."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the sampled token's and the most likely ones', best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """When the engine did what for a choice: seconds of `time.monotonic`, one clock for all processes of a machine.

    A step is the smallest thing that is timed.
    """

    queued: float
    """It arrived, before its grammar was compiled."""
    scheduled: float
    """The first step that computes something of it was planned; a preemption does not change that."""
    encoding: tuple[float, float] | None
    """When the first encoder run with a clip of its own began, and the seconds of all such runs, which other clips
    may have shared. None: nothing was encoded for it."""
    first_token: float
    """The step that sampled its first token was through."""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What one step gave one choice of a request. The last one of a choice has a finish_reason."""

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each new token when asked for, else empty."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop token that ended it (it is also the last new token)."""
    num_cached_tokens: int = 0
    """On a request's first output: prompt tokens that the prefix cache had."""
    error: str | None = None
    """With FinishReason.ERROR: what went wrong, safe to show."""
    index: int = 0
    """Which of the request's choices."""
    times: RequestTimes | None = None
    """On a choice's first output: later ones may never come, as a stop string or the caller ends it."""

    @property
    def sequence_id(self) -> SequenceId:
        """Whose output it is."""
        return self.request_id, self.index


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Forget a request, or one of its choices; nothing more is sent for it."""

    request_id: str
    index: int | None = None
    """None: all choices."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Leave the loop and end the process."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts that the engine knows once it is ready; measured ones among them."""

    max_model_len: int
    """Tokens, prompt and answer together."""
    vocab_size: int
    device: str
    dtype: str
    dtype_reason: str
    attention_backend: str
    attention_reason: str
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_batched_tokens_reason: str
    load_seconds: float
    async_scheduling: bool = False
    """Whether steps overlap (see engine/core.py)."""
    cuda_graphs: str = ""
    """How many there are and what they took, or why there are none. Empty where nobody would look for any."""
    kv_cache_dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot after a step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    """0..1."""
    num_preemptions: int = 0
    num_steps: int = 0
    prefix_cache_queries: int = 0
    """Tokens that were looked up when sequences were admitted, since the start."""
    prefix_cache_hits: int = 0
    """Those of them that were found."""
    num_draft_tokens: int = 0
    """Guesses that were verified, since the engine started."""
    num_accepted_tokens: int = 0
    """Those that came true."""
    encoder_cache_queries: int = 0
    """Clips that sequences needed, since the start."""
    encoder_cache_hits: int = 0
    """Those of them that were there already."""
    num_step_tokens: int = 0
    """Computed in all steps so far, once more for each time that they were."""
    step_sizes: tuple[int, ...] = ()
    """Steps of at most 1, 2, 4, ... tokens (see engine/step_sizes.py), and the rest."""


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Engine to client: the outputs of one step."""

    outputs: tuple[EngineOutput, ...]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """Engine to client: it could not start, or cannot go on. The last message."""

    reason: str


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Engine to client, while it starts: so many of the tensors are loaded."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class GpuReport:
    """One GPU; memory in bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """The answer of engine/probe.py."""

    torch: str
    cuda: str
    """The version that torch was built for; empty for a build that knows no GPU."""
    cpu: str
    gpus: tuple[GpuReport, ...]


@dataclass(frozen=True, slots=True)
class RankReady:
    """A rank to rank 0, twice: its weights are loaded; it serves."""


ToEngine = EngineRequest | AbortRequest | Shutdown
FromEngine = LoadProgress | EngineInfo | StepOutputs | EngineFailed


@dataclass(frozen=True, slots=True)
class EngineArgs:
    """How to build an engine. Sent to the engine process when it starts."""

    model_folder: str
    load_format: str = "auto"
    """"dummy": random weights of the folder's shape (model/dummy.py)."""
    device: str = "auto"
    dtype: str = "auto"
    attention_backend: str = "auto"
    quantization: str | None = None
    """"int8", on a CPU: see model/linear.py. "fp8", on a GPU: see model/quantization/fp8_linear.py."""
    kv_cache_dtype: str = "auto"
    """"fp8" or "fp8_e4m3": see model/kv_scales.py."""
    max_model_len: int | None = None
    """None: what the checkpoint allows."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    """None: what suits the device."""
    long_prefill_token_threshold: int = 1024
    """A sequence that lacks more tokens leaves room to others (see engine/long_lane.py). 0: none does."""
    max_encoder_frames: int = 12_000
    """Mel frames of new clips that one step may encode: 120 s of audio."""
    encoder_cache_bytes: int = 128 << 20
    """For embeddings of clips that stay on the device; at least one whole clip's are kept."""
    enable_prefix_caching: bool = True
    prefix_cache_bytes: int | None = None
    """Of computed blocks that nobody uses; None: see engine/memory.py."""
    kv_cache_memory_bytes: int | None = None
    """None: from `gpu_memory_utilization` on CUDA, 2 GiB at most on a CPU."""
    gpu_memory_utilization: float = 0.92
    async_scheduling: bool | None = None
    """Prepare a step while the one before computes; never with drafts.

    None: on CUDA, where the device computes beside the host, if there are no drafts.
    """
    enforce_eager: bool = False
    """Launch every kernel of every step: no CUDA graphs."""
    num_threads: int | None = None
    """CPU threads of the engine, of all its ranks together; None: all cores."""
    tensor_parallel_size: int = 1
    """Ranks that share the decoder, each a process with a device of its own (see model/parallel.py)."""
    rank_timeout_s: float = 30.0
    """How long a rank waits for another within a step before it gives the engine up."""
    num_speculative_tokens: int = 0
    """Drafts that a decoding sequence may have in a step; 0: no speculative decoding."""
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 8
    """Tokens that have to agree for what followed to be a draft, and agreement beyond which no longer one counts."""
    seed: int | None = None
    """Makes the seeds of requests that bring none repeatable, in order of arrival; None: from the system."""
    log_json: bool = False
    """Log lines of the engine's processes as JSON."""
