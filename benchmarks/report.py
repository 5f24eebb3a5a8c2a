"""What every result carries: hardware, versions, command, date. One JSON document, printed last, kept on request."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "transformers", "numpy", "tokenizers", "fastapi", "uvicorn", "httpx", "llguidance", "xgrammar"),
)


def describe() -> dict[str, Any]:
    """The machine and the software of this run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, "-m", *_module_and_arguments()]),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": _gpu()},
        "versions": {"python": platform.python_version(), **_versions()},
    }


def finish(result: dict[str, Any], output: Path | None) -> None:
    """Print the document as the last line, and write it to `output`."""
    document = {**describe(), **result}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


def _module_and_arguments() -> list[str]:
    module = Path(sys.argv[0]).stem
    return [f"benchmarks.{module}", *sys.argv[1:]]


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{names[0] if names else platform.processor()} ({', '.join(known)})"


def _gpu() -> str | None:
    """Of a benchmark that computes with torch; the others do not load it for this."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name(0) if torch and torch.cuda.is_available() else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
