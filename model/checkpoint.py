"""Where a checkpoint lies: a folder, or a repository id of the Hugging Face hub that is fetched once. Torch-free."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from model.errors import CheckpointError
from model.weight_files import tensor_files

WANTED_FILES = ["*.json", "*.jinja", "merges.txt"]
WEIGHT_FILES = ["*.safetensors"]
"""Data only: no pickles and no code are ever fetched."""


def resolve_checkpoint(
    path_or_id: str, revision: str | None = None, download_dir: str | None = None, *, with_weights: bool = True
) -> Path:
    """A local folder as it is; anything else as a hub id, downloaded with a progress bar unless cached.

    Raises CheckpointError when it is neither, or lacks a file of weights that are wanted.
    """
    folder = _find(path_or_id, revision, download_dir, with_weights=with_weights)
    if with_weights:
        tensor_files(folder)
    return folder


def _find(path_or_id: str, revision: str | None, download_dir: str | None, *, with_weights: bool) -> Path:
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") != 1:
        raise CheckpointError(f"{path_or_id} is neither a folder nor a hub id of the form owner/name")
    try:
        wanted = WANTED_FILES + WEIGHT_FILES if with_weights else WANTED_FILES
        return Path(snapshot_download(path_or_id, revision=revision, cache_dir=download_dir, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path_or_id} is no folder here and could not be downloaded: {reason}") from None
