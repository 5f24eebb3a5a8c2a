"""Where a checkpoint lies: a folder, or a repository id of the Hugging Face hub that is fetched once. Torch-free."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from model.config import Qwen2AudioConfig
from model.errors import CheckpointError
from model.weight_files import tensor_files

WANTED_FILES = ["*.json", "*.jinja", "merges.txt"]
WEIGHT_FILES = ["*.safetensors"]
"""Data only: no pickles and no code are ever fetched."""


def resolve_checkpoint(
    path_or_id: str,
    revision: str | None = None,
    download_dir: str | None = None,
    *,
    with_weights: bool = True,
    download: bool = True,
) -> Path:
    """A local folder as it is; anything else as a hub id, downloaded with a progress bar unless cached.

    download: False takes what is cached. Raises CheckpointError when it is neither, or lacks a file of weights that
    are wanted, and ConfigError when it is no Qwen2-Audio.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
    else:
        wanted = WANTED_FILES + WEIGHT_FILES if with_weights else WANTED_FILES
        folder = _cached(path_or_id, revision, download_dir, wanted, download=download)
    Qwen2AudioConfig.from_folder(folder)
    if with_weights:
        tensor_files(folder)
    return folder


def _cached(name: str, revision: str | None, folder: str | None, wanted: list[str], *, download: bool) -> Path:
    """The folder of a hub id in the cache."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name} is neither a folder nor a hub id of the form owner/name")
    try:
        found = snapshot_download(
            name, revision=revision, cache_dir=folder, allow_patterns=wanted, local_files_only=not download
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if not download:
            message = (
                f"{name} is no folder here and not, or not whole, in the cache: `tympan models download {name}`"
            )
            raise CheckpointError(message) from None
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{name} is no folder here and could not be downloaded: {reason}") from None
    return Path(found)
