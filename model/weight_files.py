"""Which files of a checkpoint folder hold which tensors, and whether they are all there. Torch-free.

Weights lie in one safetensors file, or in several that an index names. A file's header says what it holds and how
long it is, so that a torn one is told without reading it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from model.config import read_json
from model.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
REMEDY = "copy it there from where the others came from, or fetch the checkpoint by `tympan models download`"


def tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or from the single file's header; every file is there.

    Raises CheckpointError that names the first file that is not.
    """
    if not (folder / INDEX_FILE).exists():
        if not (folder / SINGLE_FILE).exists():
            raise CheckpointError(f"{folder} holds neither {INDEX_FILE} nor {SINGLE_FILE}: {REMEDY}")
        with open_weights(folder / SINGLE_FILE, "np") as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{INDEX_FILE} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise CheckpointError(f"{INDEX_FILE}: weight_map puts {name} outside the folder, in {file!r}")
    for name in sorted(set(weight_map.values())):
        if not (folder / name).exists():
            raise CheckpointError(f"weight file {name} is missing from {folder}: {REMEDY}")
    return dict(weight_map)


def check_headers(folder: Path, files: dict[str, str]) -> None:
    """Open every file of `tensor_files`. Raises CheckpointError when one is torn or holds other tensors."""
    for name in sorted(set(files.values())):
        with open_weights(folder / name, "np") as file:
            check_content(name, set(file.keys()), files)


def check_content(file: str, held: set[str], files: dict[str, str]) -> None:
    """Raises CheckpointError when a file holds other tensors than the index says."""
    if odd := held ^ {tensor for tensor, owner in files.items() if owner == file}:
        raise CheckpointError(f"{file} and {INDEX_FILE} disagree about tensor {sorted(odd)[0]}")


def open_weights(path: Path, framework: str) -> Any:
    """A `safe_open` for the CPU. framework: what its tensors are, "pt" or "np". Raises CheckpointError."""
    try:
        return safe_open(path, framework=framework, device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weight file {path.name} cannot be read: {error}") from None
