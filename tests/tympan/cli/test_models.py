"""`tympan models` against a hub of its own on this machine, and with files that are not what they should be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from server.__main__ import BUNDLED_CHECKPOINT
from tympan.cli.models import known_digests, size

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/tiny"
WEIGHTS = "model.safetensors"


@dataclass
class Hub:
    """The part of the hub's API that a download uses, for one repository of the bundled checkpoint's files."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)

    def etag(self, name: str) -> str:
        """As the hub has it: of LFS objects the sha256, of other files the id of a git blob."""
        data = self.files[name]
        if name == WEIGHTS:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def tree(self) -> list[dict[str, object]]:
        """The answer of /tree."""
        entries: list[dict[str, object]] = []
        for name, data in self.files.items():
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": self.etag(name)}
            if name == WEIGHTS:
                entry["lfs"] = {"oid": self.etag(name), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return entries


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    fake = Hub(files={path.name: path.read_bytes() for path in BUNDLED_CHECKPOINT.iterdir()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{NAME}/tree/"):
                self._answer(json.dumps(fake.tree()).encode(), "application/json")
            elif path.startswith(f"/api/models/{NAME}"):
                siblings = [{"rfilename": name} for name in fake.files]
                info = {
                    "id": NAME,
                    "sha": COMMIT,
                    "siblings": siblings,
                    "tags": [],
                    "downloads": 0,
                    "private": False,
                }
                self._answer(json.dumps(info).encode(), "application/json")
            elif path.startswith(f"/{NAME}/resolve/") and (name := path.rpartition("/")[2]) in fake.files:
                if self.command == "GET":
                    fake.fetched.append(name)
                self._answer(fake.files[name], "application/octet-stream", name)
            else:
                self._answer(b'{"error": "Repository not found"}', "application/json", status=404)

        do_HEAD = do_GET

        def _answer(self, body: bytes, kind: str, name: str = "", status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            if name:
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{fake.etag(name)}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield fake
        server.shutdown()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


def models(hub: Hub, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "COLUMNS": "200"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "tympan", "models", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_from_download_to_damage(hub: Hub, cache: Path) -> None:
    """One story: an empty cache, a download, a list, a second download, a check, and each way to be damaged."""
    empty = models(hub, cache, "list")
    assert (empty.returncode, empty.stdout) == (0, "")
    assert "tympan models download NAME" in empty.stderr
    uncached = models(hub, cache, "verify", NAME)
    assert uncached.returncode == 1
    assert uncached.stderr.startswith(f"tympan: {NAME} is no folder, and not in the cache: `tympan models download`")

    fetched = models(hub, cache, "download", NAME)
    assert fetched.returncode == 0, fetched.stderr
    folder = Path(fetched.stdout.strip())
    assert folder.is_relative_to(cache)
    assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert WEIGHTS in hub.fetched
    assert "README.md" not in hub.fetched
    hub.fetched.clear()
    assert models(hub, cache, "download", NAME).stdout == fetched.stdout
    assert hub.fetched == []

    [heading, row] = models(hub, cache, "list").stdout.splitlines()
    assert heading.split() == ["name", "revision", "size", "dtype", "state"]
    assert row.split()[:3] == [NAME, COMMIT[:12], "(main)"]
    assert row.split()[-2:] == ["float16", "complete"]
    sound = models(hub, cache, "verify", NAME, "--revision", COMMIT[:7])
    assert sound.returncode == 0
    assert f"sha256 of {WEIGHTS} is the hub's" in sound.stdout

    blob = (folder / WEIGHTS).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    flipped = models(hub, cache, "verify", NAME)
    assert (flipped.returncode, flipped.stderr) == (
        1, f"tympan: {blob} is damaged: delete it, and `tympan models download {NAME}`\n"
    )  # fmt: skip
    (folder / WEIGHTS).unlink()
    assert f"neither model.safetensors.index.json nor {WEIGHTS}" in models(hub, cache, "verify", NAME).stderr


def test_what_is_not_there_cannot_be_downloaded(hub: Hub, cache: Path) -> None:
    missing = models(hub, cache, "download", "owner/other")
    assert missing.returncode == 1
    assert missing.stderr.startswith("tympan: owner/other is no folder here and could not be downloaded: ")
    assert len(missing.stderr.splitlines()) == 1


def test_a_folder_is_verified(hub: Hub, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(BUNDLED_CHECKPOINT, folder)
    assert "no file's sha256 is known" in models(hub, cache, "verify", str(folder)).stdout
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    torn = models(hub, cache, "verify", str(folder))
    assert torn.returncode == 1
    assert torn.stderr.startswith(f"tympan: weight file {WEIGHTS} cannot be read: ")


def test_digests_are_known_of_links_and_of_noted_downloads(tmp_path: Path) -> None:
    digest = "ab" * 32
    (tmp_path / "blob").mkdir()
    (tmp_path / "blob" / digest).write_bytes(b"x")
    (tmp_path / "linked").symlink_to(Path("blob") / digest)
    (tmp_path / "noted").write_bytes(b"x")
    (tmp_path / "unknown").write_bytes(b"x")
    notes = tmp_path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "noted.metadata").write_text(f"{COMMIT}\n{digest}\n1700000000.0\n")
    assert dict(known_digests(tmp_path)) == {"linked": digest, "noted": digest}


@pytest.mark.parametrize(("count", "shown"), [(999, "999 B"), (13_100_000, "13.1 MB"), (16.8e9, "16.8 GB")])
def test_sizes(count: float, shown: str) -> None:
    assert size(count) == shown
