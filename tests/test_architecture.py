"""The architecture, read from the sources: who may import whom, what stays torch-free, how long things may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "engine", "model", "audio", "configs", "tympan")

ALLOWED = {
    "server": {"engine", "audio", "model", "configs"},
    "engine": {"model", "audio"},
    "model": set(),
    "audio": set(),
    "configs": set(),
    "tympan": {"server", "engine", "audio", "model", "configs"},
}
"""Packages that a package may import, itself aside. The three rules below narrow this."""
MODEL_FOR_SERVER = {"model.config", "model.checkpoint", "model.errors", "model.weight_files"}
COMPOSERS = {"server.__main__", "server.app"}
"""The only readers of configs."""
SERVER_ROOMS = (
    "errors",
    "version",
    "tools",
    "observe",
    "access",
    "requests",
    "http",
    "structured",
    "media",
    "prompt",
    "generation",
    "responses",
    "transcription",
    "api",
)
"""What server consists of, from the ground up: each imports only what stands before it. The other modules of the
folder itself (app, lifecycle, __main__...) put the rooms together, and none of the rooms imports them."""
TORCH_FREE_ENGINE = {
    "engine.answer",
    "engine.block_manager",
    "engine.channel",
    "engine.client",
    "engine.cores",
    "engine.encoder_cache",
    "engine.errors",
    "engine.guidance",
    "engine.input_batch",
    "engine.log_lines",
    "engine.long_lane",
    "engine.messages",
    "engine.plan",
    "engine.prefix_cache",
    "engine.prompt_lookup",
    "engine.request_check",
    "engine.sample_row",
    "engine.scheduler",
    "engine.sequence",
    "engine.sequence_queue",
    "engine.spawn",
    "engine.speculation",
    "engine.step_sizes",
    "engine.supervisor",
    "engine.vital_signs",
}
MAX_MODULE_LINES = 400
MAX_READING_LINES = 2500
"""Of the files that docs/architecture.md names for understanding it all."""
MAX_FUNCTION_LINES = 50


def name_of(path: Path) -> str:
    """Dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
every_module = pytest.mark.parametrize("module", SOURCES)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def imports_of(module: str) -> Iterator[str]:
    """Dotted names of what a module imports; `from a import b` gives a.b where that is a module, else a."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} relative import"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in SOURCES else node.module for name in names)


def top(name: str) -> str:
    return name.partition(".")[0]


def functions_of(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_there_are_sources_to_read() -> None:
    assert {"engine.core", "model.qwen2_audio"} <= SOURCES.keys()
    assert SOURCES.keys() >= TORCH_FREE_ENGINE | MODEL_FOR_SERVER


@every_module
def test_imports_go_one_way(module: str) -> None:
    package = top(module)
    ours = {name for name in imports_of(module) if top(name) in PACKAGES and top(name) != package}
    assert {top(name) for name in ours} <= ALLOWED[package]
    if package in ("server", "tympan"):
        assert {name for name in ours if top(name) == "model"} <= MODEL_FOR_SERVER
    if package == "server":
        assert module in COMPOSERS or "configs" not in {top(name) for name in ours}


def room_of(module: str) -> int:
    """Where a module of server stands in SERVER_ROOMS; behind all of them what puts the rooms together."""
    name = module.split(".")[1]
    return SERVER_ROOMS.index(name) if name in SERVER_ROOMS else len(SERVER_ROOMS)


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("server.")])
def test_imports_within_the_server_go_one_way(module: str) -> None:
    for name in imports_of(module):
        if name.startswith("server."):
            assert room_of(name) <= room_of(module), name


def test_every_room_of_the_server_has_its_place() -> None:
    assert set(SERVER_ROOMS) <= {name.split(".")[1] for name in SOURCES if name.startswith("server.")}
    assert {path.parent.name for path in (ROOT / "server").glob("*/*.py")} <= set(SERVER_ROOMS)


@every_module
def test_transformers_is_no_part_of_the_program(module: str) -> None:
    assert "transformers" not in {top(name) for name in imports_of(module)}


@every_module
def test_pickle_is_used_by_the_private_channel_alone(module: str) -> None:
    unsafe = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    allowed = {"pickle"} if module == "engine.channel" else set()
    assert {top(name) for name in imports_of(module)} & unsafe <= allowed


@every_module
def test_nothing_is_loaded_by_torch_load_or_run_by_eval(module: str) -> None:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"torch.load", "eval", "exec", "os.system"}, f"line {node.lineno}"


@every_module
def test_imports_stand_at_the_top(module: str) -> None:
    for function in functions_of(module):
        for node in ast.walk(function):
            assert not isinstance(node, ast.Import | ast.ImportFrom), f"{function.name}, line {node.lineno}"


@every_module
def test_a_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(tree_of(module))


@every_module
def test_modules_stay_readable_in_one_sitting(module: str) -> None:
    assert len(SOURCES[module].read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES


@every_module
def test_functions_stay_short(module: str) -> None:
    for function in functions_of(module):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{function.name} has {length} lines"


def torch_free_modules() -> list[str]:
    whole = [name for name in SOURCES if top(name) in ("server", "audio", "configs", "tympan")]
    return sorted({*whole, *TORCH_FREE_ENGINE, *MODEL_FOR_SERVER})


@pytest.mark.parametrize("package", ["server", "audio", "configs", "engine", "model", "tympan"])
def test_the_http_side_never_loads_torch(package: str) -> None:
    """A fresh interpreter that imports every torch-free module of a package has neither torch nor transformers."""
    modules = [name for name in torch_free_modules() if top(name) == package and not name.endswith("__main__")]
    if package == "server" and "server.__main__" in SOURCES:
        modules.append("server.__main__")
    script = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    loaded = sorted({{"torch", "transformers"}} & sys.modules.keys())
    assert not loaded, f"{{name}} loads {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_packages_are_listed_for_installation() -> None:
    """Every folder with sources is in pyproject.toml: an installed program lacks nothing."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES.values()}
    assert folders == set(settings["tool"]["setuptools"]["packages"])


def test_the_reading_order_is_there_and_short() -> None:
    """docs/architecture.md tells about how long each file is; all together are read in an afternoon."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+\.py)` \| (\d+) \|", text, re.MULTILINE)
    assert len(rows) >= 10
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name, _ in rows}
    assert sum(lengths.values()) <= MAX_READING_LINES
    for name, told in rows:
        assert abs(int(told) - lengths[name]) <= 10 + lengths[name] // 10, f"{name} has {lengths[name]} lines"


def test_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:server|engine|model|audio|configs|tests|tympan)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
