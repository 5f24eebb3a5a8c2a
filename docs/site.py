"""What `make docs` adds to the pages of docs/: pages that lie elsewhere in the repository, and the API's fields.

Links are written for who reads the repository. Here they are turned to the page, or to a copy of the file that they
name, so that `mkdocs build --strict` checks all of them; one that leads nowhere stays as it is and fails the build.
So does a page that would ask another host for anything.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from docs.fields import fields_page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "checkpoints/tympan-tiny/README.md": "tympan-tiny.md",
    "checkpoints/training/README.md": "training.md",
}
"""Files of the repository that are pages of the site."""
COPIES = "files"
"""The site's folder of other files that pages link to."""
_LINK = re.compile(r"(?<=\]\()[^)\s]+")
_ROW = re.compile(r"^\|.*$", re.MULTILINE)
_CODE = re.compile(r"`[^`]+`")
_FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)
_REQUEST = re.compile(
    r"<(?:script|img|iframe|audio|video|source|embed)[^>]+src=[\"']?(?:https?:)?//[^>]*>"
    r"|<link[^>]+href=[\"']?(?:https?:)?//[^>]*>|url\(\s*[\"']?(?:https?:)?//[^)]*\)|@import [^;]*//[^;]*;"
)


def on_files(files: Files, config: Any) -> Files:
    """Add what pages need from outside of docs/."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text(encoding="utf-8")))
    files.append(File.generated(config, "fields.md", content=fields_page()))
    for file in files.documentation_pages():
        for path in _files_named(source_of(file.src_uri), file.content_string):
            uri = uri_of(path)
            if uri.startswith(f"{COPIES}/") and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn its links, and write its tables for this Markdown."""
    return plain_pipes(turn_links(page.file.src_uri, markdown))


def on_post_build(config: Any) -> None:
    """Fail where the finished site would ask another host."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css") and (found := request_in(path.read_text(encoding="utf-8"))):
            raise PluginError(f"{path.name} asks another host: {found}")


def request_in(text: str) -> str | None:
    """What in a page or a style sheet a browser would load from another host."""
    found = _REQUEST.search(text)
    return found.group() if found else None


def source_of(uri: str) -> str:
    """Where a page lies in the repository."""
    return {uri: path for path, uri in PAGES.items()}.get(uri, f"docs/{uri}")


def uri_of(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIES}/{path}")


def turn_links(uri: str, markdown: str) -> str:
    """A page's text, its links leading through the site."""
    pieces = _FENCE.split(markdown)
    pieces[::2] = [_LINK.sub(lambda found: _turned(uri, found.group()), text) for text in pieces[::2]]
    return "".join(pieces)


def plain_pipes(markdown: str) -> str:
    """A page's text, `\\|` in the code of tables as `|`: GitHub wants the one, Python's Markdown the other."""
    pieces = _FENCE.split(markdown)
    pieces[::2] = [_ROW.sub(lambda row: _CODE.sub(_plain, row.group()), text) for text in pieces[::2]]
    return "".join(pieces)


def _plain(code: re.Match[str]) -> str:
    return code.group().replace("\\|", "|")


def _turned(uri: str, link: str) -> str:
    path = _file_named(source_of(uri), link)
    if path is None:
        return link
    _, hash_sign, anchor = link.partition("#")
    return posixpath.relpath(uri_of(path), posixpath.dirname(uri) or ".") + hash_sign + anchor


def _files_named(source: str, markdown: str) -> Iterator[str]:
    """The repository's files that a page links to."""
    for text in _FENCE.split(markdown)[::2]:
        yield from filter(None, (_file_named(source, link) for link in _LINK.findall(text)))


def _file_named(source: str, link: str) -> str | None:
    target = link.partition("#")[0]
    path = os.path.normpath(posixpath.join(posixpath.dirname(source), target))
    return path if target and "://" not in target and (ROOT / path).is_file() else None
