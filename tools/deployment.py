"""Lint what is deployed: the image, compose files, manifests, nginx, CI's files. `make lint-deploy`.

What needs a cluster or a Docker engine is not here: tests/deploy runs the topology.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tools.custom_resources import MODELS
from tools.locked import ROOT

BIN = Path(sys.executable).parent
DEPLOY = ROOT / "deploy"
GITHUB = ROOT / ".github"
COMPOSE = [ROOT / "docker-compose.yml", *sorted(DEPLOY.glob("compose.*.yml"))]
KUSTOMIZATION = "kustomization.yaml"

Command = list[str | Path]


class _Compose(yaml.SafeLoader):
    """Compose's own tags take a value away, or put another in its place."""


_Compose.add_constructor("!reset", lambda _loader, _node: None)
_Compose.add_constructor("!override", lambda loader, node: loader.construct_object(node, deep=True))


def commands(folder: Path) -> Iterator[Command]:
    """All that can run here; `folder` takes what is written for them."""
    yield [BIN / "yamllint", "--strict", ROOT]
    yield [BIN / "shellcheck", ROOT / ".ci/run", *sorted(DEPLOY.glob("*.sh"))]
    yield [BIN / "hadolint", "--config", ROOT / ".hadolint.yaml", ROOT / "Dockerfile"]
    for kind, files in (
        ("compose-spec", [_as_json(path, folder) for path in COMPOSE]),
        ("github-workflows", sorted((GITHUB / "workflows").glob("*.yml"))),
        ("github-issue-config", [GITHUB / "ISSUE_TEMPLATE/config.yml"]),
        ("github-issue-forms", [one for one in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if one.stem != "config"]),
    ):
        yield [BIN / "check-jsonschema", "--quiet", "--builtin-schema", f"vendor.{kind}", *files]
    manifests = [path for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")) if path.name != KUSTOMIZATION]
    custom = [path for path in manifests if _is_custom(path)]
    yield [BIN / "kubernetes-validate", "--strict", "--quiet", *(path for path in manifests if path not in custom)]
    yield [sys.executable, "-m", "tools.custom_resources", *custom]
    if program := shutil.which("nginx"):
        yield [program, "-t", "-q", "-p", folder, "-c", _on_this_machine(DEPLOY / "nginx.conf", folder)]
    else:
        print("deploy/nginx.conf: NOT CHECKED, nginx is not installed")


def _as_json(path: Path, folder: Path) -> Path:
    documents: Any = yaml.load(path.read_text(), _Compose)
    target = folder / f"{path.stem}.json"
    target.write_text(json.dumps(documents))
    return target


def _is_custom(path: Path) -> bool:
    """Whether all its documents are of kinds that come with an extension. Any other that has no schema fails."""
    return all((one["apiVersion"], one["kind"]) in MODELS for one in yaml.safe_load_all(path.read_text()))


def _on_this_machine(path: Path, folder: Path) -> Path:
    """The replicas' names resolve in the network of compose only."""
    text = path.read_text()
    for name in ("tympan-0:", "tympan-1:"):
        assert name in text, f"{path} names no {name}"
        text = text.replace(name, "127.0.0.1:")
    target = folder / "nginx.conf"
    target.write_text(text.replace("/tmp/", f"{folder}/"))
    return target


def _name(command: Command) -> str:
    return str(command[2]) if command[1] == "-m" else Path(command[0]).name


def main() -> int:
    """Run all of them, whatever some say. -> exit status."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for command in commands(Path(folder)):
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            output = answer.stdout + answer.stderr
            is_bad = answer.returncode != 0 or "Couldn't find schema" in output
            failed += is_bad
            print(f"{'FAILED' if is_bad else 'ok'}: {_name(command)}", output if is_bad else "", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
