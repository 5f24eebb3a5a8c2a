"""A comparison's figures as a table of Markdown, and the page that shows them. benchmarks.picture is its program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.bar import find_cell

COMMAND = "python -m benchmarks.picture benchmarks/results/cpu/compare.json docs/images/cpu.png README.md"
BEGIN = f"<!-- figures: {COMMAND} -->\n"
END = "<!-- end of figures -->\n"
BUSY, ALONE = 16, 1
"""Clients at once."""
LONG, SHORT = 10.0, 2.0
"""Seconds of a clip."""
NOT_MEASURED = "not measured"


def with_figures(page: str, document: dict[str, Any]) -> str:
    """The page with what stands between its marks written anew."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return "\n".join([f"{head}{BEGIN}", *table(document), "", f"{END}{tail}"])


def table(document: dict[str, Any]) -> Iterator[str]:
    """The table's lines, and a sentence that says of what."""
    checkpoint, hardware, versions = document["checkpoint"], document["hardware"], document["versions"]
    vllm = document.get("peers", {}).get("vllm", "")
    yield f"| | Tympan | vLLM {vllm} | transformers {versions['transformers']}, static batch |"
    yield "| --- | ---: | ---: | ---: |"
    for clip in (LONG, SHORT):
        for clients in (BUSY, ALONE):
            yield _row(document, clip, clients, "requests_per_s", "requests/s")
            yield _row(document, clip, clients, "ttft_s", "median seconds to the first token")
    yield _row(document, LONG, ALONE, "time_per_output_token_s", "milliseconds a token", 1e-3)
    servers = document["servers"]
    yield _servers_row(servers, "memory_bytes", "memory under load, GB", 1e9)
    yield _servers_row(servers, "ready_s", "seconds from start to ready", 1)
    yield ""
    yield (
        f"{checkpoint['parameters'] / 1e6:.0f} M random weights in {checkpoint['dtype']}, the same requests of "
        f"{document['settings']['output_tokens']} output tokens, one server after the other; "
        f"{hardware['cores']} cores of an {hardware['cpu']}, {document['date'][:10]}. "
        "transformers runs in its own process, without HTTP."
    )


def _row(document: dict[str, Any], clip: float, clients: int, figure: str, label: str, unit: float = 1) -> str:
    cell = find_cell(document, clip, clients)
    found = [cell.get(name, {}).get(figure) for name in ("tympan", "vllm")]
    found.append(_batch(document, clip, clients, figure))
    shown = [_shown(None if value is None else value / unit) for value in found]
    return f"| {clients} at once, {clip:g} s of audio: {label} | {' | '.join(shown)} |"


def _batch(document: dict[str, Any], clip: float, clients: int, figure: str) -> float | None:
    for row in document["offline"]:
        if (row["clip_seconds"], row["requests"]) == (clip, clients):
            value: Any = row.get(figure, {}).get("transformers")
            return value["p50"] if figure == "ttft_s" else value
    return None


def _servers_row(servers: dict[str, Any], figure: str, label: str, unit: float) -> str:
    found = [servers[name][figure] / unit if name in servers else None for name in ("tympan", "vllm")]
    return f"| {label} | {' | '.join(map(_shown, found))} | |"


def _shown(value: float | None) -> str:
    """Two or three significant digits."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
