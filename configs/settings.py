"""Every setting of the server: its name, default, range and meaning. One frozen tree, checked at start-up.

A field `max_model_len` is the flag --max-model-len, the variable TYMPAN_MAX_MODEL_LEN and the YAML key
max-model-len (or max_model_len). A field's description is its help text; its group is its heading there.
Where values come from is configs/command_line.py's business.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, DirectoryPath, Field, NonNegativeInt, StringConstraints
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

ENV_PREFIX = "TYMPAN_"


def _split(value: object) -> object:
    """Environment variables hold lists as a,b."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _parse_limits(value: object) -> object:
    """`audio=4`, or JSON, or a mapping as YAML has it."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return json.loads(value)
    return dict(pair.strip().split("=", 1) for pair in value.split(",") if "=" in pair) or value


def _split_keys(value: object) -> object:
    """As names, but set and empty is an accident that must not open the server."""
    keys = _split(value)
    if isinstance(value, str) and not keys:
        raise ValueError("it is set, and holds no key")
    return keys


Origin = Annotated[str, StringConstraints(pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[a-z0-9._\[\]:-]+)$")]
"""As browsers write it: in lower case, without a path or a final slash."""
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]


def _setting(group: str, default: Any, help_text: str, *, metavar: str | None = None, **limits: Any) -> Any:
    extra: JsonDict = {"group": group, "metavar": metavar} if metavar else {"group": group}
    return Field(default, description=help_text, json_schema_extra=extra, **limits)


class Settings(BaseModel):
    """The settings tree, flat: the groups are only headings."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True)

    model: str | None = _setting(
        "model",
        None,
        "folder of a Qwen2-Audio checkpoint, or its id on the Hugging Face hub; "
        "default: the small checkpoint that comes with Tympan",
        metavar="PATH_OR_ID",
    )
    served_model_name: Names = _setting(
        "model",
        (),
        "names that requests may give as `model`, the first one is shown in answers to requests that give none; "
        "default: the value of --model",
        metavar="NAME",
    )
    revision: str | None = _setting("model", None, "branch, tag or commit on the hub")
    download_dir: str | None = _setting("model", None, "where downloads are kept; default: the hub's own cache")
    load_format: Literal["auto", "dummy"] = _setting(
        "model",
        "auto",
        "auto: the checkpoint's weights; dummy: random ones of its shape, to measure speed with, for which its "
        "configuration and tokenizer are enough",
    )
    generation_config: Literal["auto", "none"] = _setting(
        "model",
        "auto",
        "sampling defaults of requests: auto takes the checkpoint's generation_config.json, "
        "none OpenAI's (temperature 1, top_p 1)",
    )

    device: Literal["auto", "cuda", "cpu"] = _setting("engine", "auto", "where to compute")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _setting(
        "engine", "auto", "precision of weights and activations"
    )
    attention_backend: Literal["auto", "cpu", "triton", "flash_attn", "torch_varlen", "reference"] = _setting(
        "engine",
        "auto",
        "attention kernels; auto on CUDA: triton, our own, else flash_attn (version 3 on Hopper where it is "
        "installed, else 2), else torch_varlen, else plain torch, the reference; on a CPU: cpu",
    )
    quantization: Literal["fp8", "int8"] | None = _setting(
        "engine",
        None,
        "fp8: on a GPU, the decoder multiplies in float8 (e4m3); int8: on a CPU, products of few rows read weights "
        "of 8 bits; default: weights as stored",
    )
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = _setting(
        "engine",
        "auto",
        "precision of keys and values: fp8 (e4m3) holds twice the tokens of bfloat16, under scales that the "
        "checkpoint brings or that no value exceeds; auto: as computed",
    )
    tensor_parallel_size: int = _setting(
        "engine",
        1,
        "GPUs of this machine that share one model, for cards that are too small alone; it must divide the numbers "
        "of attention and key-value heads",
        ge=1,
        le=64,
    )
    seed: int | None = _setting(
        "engine", None, "base of the seeds of requests that bring none; default: from the system", ge=0, lt=2**63
    )
    max_model_len: int | None = _setting(
        "engine", None, "longest prompt and answer together, in tokens; default: what the checkpoint allows", ge=16
    )
    max_num_seqs: int = _setting("engine", 64, "most requests that run at once; more wait", ge=1)
    async_scheduling: bool | None = _setting(
        "engine",
        None,
        "prepare a step while the device computes the one before; default: on CUDA only, as a CPU has nothing to "
        "spare meanwhile, and not with --num-speculative-tokens",
    )
    enforce_eager: bool = _setting(
        "engine",
        False,
        "launch every kernel of every step, without CUDA graphs: slower at small batches, starts sooner, and takes "
        "less of the GPU's memory",
    )
    max_num_batched_tokens: int | None = _setting(
        "engine",
        None,
        "most tokens that one step computes: fewer let answers flow more evenly, more begin them sooner; "
        "default: 1024 on a GPU, 512 on a CPU",
        ge=16,
    )
    long_prefill_token_threshold: int = _setting(
        "engine",
        1024,
        "prompts that lack more tokens leave half of a step to shorter ones that wait; 0: first come, first served",
        ge=0,
    )
    num_speculative_tokens: int = _setting(
        "engine",
        0,
        "tokens that a step may guess ahead for an answer, where its last ones stood before in prompt or answer, "
        "and verify: no answer changes; 0: off",
        ge=0,
        le=32,
    )
    prompt_lookup_min: int = _setting("engine", 2, "tokens that must have stood before for a guess", ge=1, le=64)
    prompt_lookup_max: int = _setting(
        "engine",
        8,
        "of several places the one that agrees with the most tokens is taken, at most with so many",
        ge=1,
        le=64,
    )
    enable_prefix_caching: bool = _setting(
        "engine",
        True,
        "keep what is computed of prompts and answers, while there is room, for prompts that begin alike",
    )
    prefix_cache_mb: float | None = _setting(
        "engine",
        None,
        "of that, the most that is kept while nobody uses it, in MiB; default: on a CPU, where memory is taken only "
        "when it is used, 128 or one whole context, on a GPU all of the KV cache",
        ge=0,
    )
    encoder_cache_mb: float = _setting(
        "engine", 128, "memory for encoded clips, in MiB; at least one clip is kept while it is needed", ge=0
    )
    gpu_memory_utilization: float = _setting(
        "engine", 0.92, "share of the GPU's memory that weights and KV cache may take", gt=0, le=1
    )
    kv_cache_memory_bytes: int | None = _setting(
        "engine", None, "size of the KV cache, instead of what --gpu-memory-utilization gives", ge=1
    )

    host: str = _setting(
        "server", "127.0.0.1", "address to listen on: this machine only unless set; 0.0.0.0 opens it to the network"
    )
    port: int = _setting("server", 8000, "port to listen on; 0 takes a free one", ge=0, le=65535)
    api_key: Annotated[tuple[str, ...], BeforeValidator(_split_keys)] = _setting(
        "server",
        (),
        "key that requests must send as a bearer token (repeatable), /health and /ready aside; other users of this "
        "machine see it in the list of processes, so better use the environment or --api-key-file; "
        "default: open to all",
        metavar="KEY",
    )
    api_key_file: Annotated[str, Field(min_length=1)] | None = _setting(
        "server",
        None,
        "file with more keys, one a line, # for comments; read again when it changes",
        metavar="FILE",
    )
    allowed_origins: Annotated[tuple[Origin, ...], BeforeValidator(_split)] = _setting(
        "server",
        (),
        "origins whose web pages may call the server from a browser, as https://app.example; * for all; "
        "default: none",
        metavar="ORIGIN",
    )
    allowed_hosts: Names = _setting(
        "server",
        (),
        "names by which clients may call a server that has no keys and listens on this machine only, beside its "
        "addresses and names without a dot: what a proxy passes on as Host, say",
        metavar="NAME",
    )
    playground: bool = _setting(
        "server", True, "serve the page for people under / and its files under /static/, which need no key"
    )
    max_requests_per_minute: int | None = _setting(
        "server", None, "most requests (POST) of one key in a minute; default: no limit", ge=1
    )
    max_audio_seconds_per_minute: float | None = _setting(
        "server",
        None,
        "most audio of one key in a minute, in seconds; longer audio is accepted, and delays what comes after it; "
        "default: no limit",
        gt=0,
    )
    max_concurrent_requests_per_key: int | None = _setting(
        "server", None, "most requests (POST) of one key at once; default: no limit", ge=1
    )
    max_body_mb: float = _setting("server", 64, "largest request body, in MiB", gt=0)
    max_body_memory_mb: float = _setting(
        "server", 32, "memory for the bodies of all requests together, in MiB, but for the audio in them", gt=0
    )
    max_body_disk_mb: float = _setting(
        "server", 16_384, "disk for that audio and for uploads, of all requests together, in MiB, in TMPDIR", gt=0
    )
    max_num_queued_reqs: int = _setting(
        "server",
        1024,
        "most requests that wait beyond the --max-num-seqs that run; more are refused with 503",
        ge=0,
    )
    max_num_queued_tokens: int | None = _setting(
        "server",
        None,
        "most prompt tokens that wait for the engine, about the seconds a first token may take times the tokens "
        "computed in one; more are refused with 503; default: no bound of their own",
        ge=1,
    )
    request_timeout: float = _setting(
        "server",
        0,
        "seconds that the engine may take for one prompt, waiting included, before its request ends with 504; "
        "0: no limit",
        ge=0,
    )
    sse_keep_alive_interval: float = _setting(
        "server", 15, "seconds of silence after which a stream gets a keep-alive comment; 0: never", ge=0
    )
    shutdown_timeout: float = _setting(
        "server", 120, "seconds that running requests may take to finish on SIGTERM", ge=0
    )
    metrics_port: int | None = _setting(
        "server",
        None,
        "port that serves /metrics and nothing else, without a key; 0 takes a free one; default: none",
        ge=0,
        le=65535,
    )
    metrics_host: str = _setting(
        "server", "127.0.0.1", "address of --metrics-port: this machine only unless set, as it asks for no key"
    )
    otlp_traces_endpoint: str | None = _setting(
        "server",
        None,
        "URL that traces are sent to as OTLP over HTTP, such as http://localhost:4318/v1/traces; needs the extra "
        "tympan[otel]; default: no traces",
        metavar="URL",
        pattern=r"^https?://\S+$",
    )
    log_json: bool = _setting("server", False, "log lines as JSON, each request's with all that is known of it")
    drain_grace: float = _setting(
        "server",
        2,
        "seconds after SIGTERM in which the server goes on to say that it is shutting down, with nothing to finish "
        "too, so that load balancers see it; SIGINT has none",
        ge=0,
    )
    engine_restarts: int = _setting(
        "server",
        5,
        "times in ten minutes that an engine which died or hung is started again; then, or with 0, the server "
        "ends with status 1",
        ge=0,
    )
    engine_hang_timeout: float = _setting(
        "server",
        300,
        "seconds without a step, while requests wait, after which the engine is killed and started again: more than "
        "the longest step takes; one that does not even compute is given 3; 0: never",
        ge=0,
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting("server", "info", "least severe log lines")

    max_audio_clip_mb: float = _setting("audio", 25, "largest encoded clip, in MiB", gt=0)
    max_audio_seconds: float = _setting(
        "audio", 600, "longest uploaded clip or audio part of a chat or completion that is decoded, in seconds", gt=0
    )
    max_audio_seconds_per_request: float = _setting(
        "audio", 1200, "most audio in one chat or completion, all its parts together, in seconds", gt=0
    )
    long_audio: Literal["split", "error", "truncate"] = _setting(
        "audio",
        "split",
        "audio over 30 s in chats and completions that do not say themselves: split into consecutive clips of one "
        "prompt, refuse, or truncate and tell",
    )
    max_upload_mb: float = _setting(
        "audio", 512, "largest upload for transcription, in MiB; beyond 1 MiB it is on disk, in TMPDIR", gt=0
    )
    max_transcription_seconds: float = _setting(
        "audio", 43_200, "longest recording that is transcribed, in seconds", gt=0
    )
    transcription_window_seconds: float = _setting(
        "audio",
        30,
        "longest piece of a recording that is transcribed at once, in seconds; checkpoints trained on short clips "
        "do better with less than the 30 that the model can hear",
        ge=2,
        le=30,
    )
    transcription_recipe: Literal["auto", "chat", "base"] = _setting(
        "audio",
        "auto",
        "how transcriptions are prompted: as a chat turn, or with the base checkpoint's raw prompts; auto: chat if "
        "<|im_end|> ends the checkpoint's answers",
    )
    max_stored_audio_mb: float = _setting(
        "audio", 256, "memory for uploaded clips, in MiB; every API key has an equal share of it", ge=0
    )
    max_audio_memory_mb: float = _setting(
        "audio", 2048, "memory for the decoded audio of all requests together, in MiB; 30 s are 1.9", gt=0
    )
    stored_audio_ttl: float = _setting("audio", 3600, "seconds that an uploaded clip is kept", gt=0)
    limit_mm_per_prompt: Annotated[dict[Literal["audio"], NonNegativeInt], BeforeValidator(_parse_limits)] = (
        _setting("audio", {"audio": 16}, "most clips in one request, as audio=N", metavar="audio=N")
    )
    allowed_media_domains: Names = _setting(
        "audio",
        (),
        "the only domains that audio is fetched from; a leading dot includes subdomains; default: any public one",
        metavar="DOMAIN",
    )
    allowed_private_media_hosts: Names = _setting(
        "audio",
        (),
        "hosts that audio may be fetched from though their addresses are private or loopback",
        metavar="HOST[:PORT]",
    )
    allowed_local_media_path: DirectoryPath | None = _setting(
        "audio",
        None,
        "folder whose files requests may name by file: URLs, subfolders included, links out of it not; "
        "default: file: URLs are refused",
        metavar="DIR",
    )
    media_cache_mb: float = _setting(
        "audio",
        64,
        "memory for audio that was fetched, in MiB, as long as its origin's Cache-Control and validators allow, an "
        "hour at most; every API key has an equal share of it; 0: everything is fetched anew",
        ge=0,
    )

    @property
    def max_audio_clips(self) -> int:
        """Clips that one request may have."""
        return self.limit_mm_per_prompt.get("audio", 16)


def group_of(field: FieldInfo) -> str:
    """The heading under which a setting is listed."""
    extra = field.json_schema_extra
    return str(extra["group"]) if isinstance(extra, dict) else ""


def metavar_of(field: FieldInfo) -> str | None:
    """What stands for a setting's value in the help text, if the field says so."""
    extra = field.json_schema_extra
    return str(extra["metavar"]) if isinstance(extra, dict) and "metavar" in extra else None
