"""`tympan models`: which checkpoints lie in the hub's cache, fetching one, whether its files are as they should be.

Only Qwen2-Audio checkpoints are listed: the cache may hold anything. Digests are known of files that the hub keeps
as LFS objects, by the names under which its cache holds them; of others there is nothing to compare with.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from model.checkpoint import resolve_checkpoint
from model.config import Qwen2AudioConfig
from model.errors import ModelError
from model.weight_files import check_headers, tensor_files
from server.prompt.consistency import check_folder
from tympan.cli.errors import CommandError

CHUNK_BYTES = 8 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOCAL_METADATA = Path(".cache") / "huggingface" / "download"
"""Where the hub's client notes what it has put into a folder of the user's choice."""


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One revision of one repository."""

    name: str
    revision: str
    refs: tuple[str, ...]
    folder: Path
    num_bytes: int
    dtype: str
    fault: str
    """Why it could not be served; empty when nothing is missing."""


def cached_models(download_dir: Path | None) -> list[CachedModel]:
    """The Qwen2-Audio checkpoints of the cache, by name, the last fetched revision first."""
    try:
        cache = scan_cache_dir(download_dir)
    except CacheNotFound:
        return []
    found = []
    for repository in sorted(cache.repos, key=lambda repository: str(repository.repo_id)):
        for revision in sorted(repository.revisions, key=lambda revision: -revision.last_modified):
            try:
                config = Qwen2AudioConfig.from_folder(revision.snapshot_path)
            except ModelError:
                continue
            found.append(
                CachedModel(
                    name=repository.repo_id,
                    revision=revision.commit_hash,
                    refs=tuple(sorted(revision.refs)),
                    folder=revision.snapshot_path,
                    num_bytes=revision.size_on_disk,
                    dtype=config.dtype,
                    fault=fault_of(revision.snapshot_path),
                )
            )
    return found


def fault_of(folder: Path) -> str:
    """What keeps a checkpoint from being served, in the words of `tympan serve`; empty when nothing does."""
    try:
        Qwen2AudioConfig.from_folder(folder)
        check_headers(folder, tensor_files(folder))
        check_folder(folder)
    except ModelError as error:
        return str(error)
    return ""


def show_list(download_dir: Path | None) -> None:
    """A table on standard output."""
    models = cached_models(download_dir)
    table = Table("name", "revision", "size", "dtype", "state", box=None, pad_edge=False)
    for model in models:
        revision = " ".join((model.revision[:12], *(f"({ref})" for ref in model.refs)))
        table.add_row(model.name, revision, size(model.num_bytes), model.dtype, model.fault or "complete")
    if models:
        Console(highlight=False, markup=False).print(table)
    else:
        Console(stderr=True).print("no Qwen2-Audio checkpoint is cached; `tympan models download NAME` fetches one")


def download(name: str, revision: str | None, download_dir: Path | None) -> Path:
    """Fetch what is not there yet. -> its folder. Raises CommandError."""
    try:
        folder = resolve_checkpoint(name, revision, None if download_dir is None else str(download_dir))
    except ModelError as error:
        raise CommandError(str(error)) from None
    if fault := fault_of(folder):
        raise CommandError(fault)
    return folder


def verify(name: str, revision: str | None, download_dir: Path | None) -> None:
    """Check a folder or a cached checkpoint, and say what was checked. Raises CommandError for what is wrong."""
    folder = _find(name, revision, download_dir)
    if fault := fault_of(folder):
        raise CommandError(fault)
    console = Console(highlight=False)
    num_tensors, num_files = len(tensor_files(folder)), len(set(tensor_files(folder).values()))
    console.print(f"{num_tensors} tensors in {num_files} files, as index and headers say", markup=False)
    console.print("configuration, tokenizer and chat template fit each other")
    digests = dict(known_digests(folder))
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("sha256", total=sum((folder / file).stat().st_size for file in digests))
        for file, expected in digests.items():
            if sha256(folder / file, lambda count: progress.advance(task, count)) != expected:
                damaged = (folder / file).resolve()
                raise CommandError(f"{damaged} is damaged: delete it, and `tympan models download {name}`")
    if digests:
        console.print(f"sha256 of {', '.join(digests)} is the hub's", markup=False)
    else:
        console.print("no file's sha256 is known")


def known_digests(folder: Path) -> Iterator[tuple[str, str]]:
    """(file name, sha256) of the files that the hub has a digest of."""
    for path in sorted(folder.iterdir()):
        noted = folder / _LOCAL_METADATA / f"{path.name}.metadata"
        words = noted.read_text(encoding="utf-8").split() if noted.is_file() else []
        if path.is_symlink():
            words.append(Path(os.readlink(path)).name)
        for word in words:
            if _SHA256.fullmatch(word):
                yield path.name, word


def sha256(path: Path, advance: Callable[[int], object]) -> str:
    """In hexadecimal digits; tells `advance` how many bytes have been read since it was last told."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def size(num_bytes: float) -> str:
    """For people: 16.8 GB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


def _find(name: str, revision: str | None, download_dir: Path | None) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    for model in cached_models(download_dir):
        is_asked_for = revision is None or revision in model.refs or model.revision.startswith(revision)
        if model.name == name and is_asked_for:
            return model.folder
    wanted = name if revision is None else f"{name} at {revision}"
    raise CommandError(f"{wanted} is no folder, and not in the cache: `tympan models download` fetches it")
