"""The rooms: imports go one way, what must be light is light, every package is listed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "compiler": "hone",
    "models": "hone.models",
    "passes": "hone.passes",
    "targets": "hone.targets",
}
RANK = {"targets": 0, "passes": 1, "compiler": 2, "cli": 3}
# Vocabulary that everybody raises, and the version: they import nothing of hone.
LEAVES = {"hone", "hone.errors"}


def sources() -> list[tuple[Path, str]]:
    return [
        (path, room)
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        if path.name != "train.py"  # a maintainer's script, which may use everything
    ]


def imported(path: Path, room: str) -> set[str]:
    """Return the absolute names that a file imports, at any depth of its code."""
    package = ".".join([ROOMS[room], *path.relative_to(ROOT / room).parent.parts])
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def room_of(name: str) -> str | None:
    """Return the room of an absolute name, None for what is not hone's or is a leaf."""
    parts = name.split(".")
    if parts[0] != "hone" or name in LEAVES or ".".join(parts[:2]) in LEAVES:
        return None
    if len(parts) > 1 and parts[1] in ("passes", "targets", "models", "cli"):
        return parts[1]
    return "compiler"


@pytest.mark.parametrize(
    ("path", "room"), sources(), ids=lambda value: str(value).removeprefix(str(ROOT))
)
def test_imports_go_one_way(path: Path, room: str) -> None:
    own = "cli" if path.parent.name == "cli" else room
    for name in imported(path, room):
        # `from hone import x` names either a module of the compiler or an attribute of a leaf.
        other = room_of(name)
        if other is None or other == own or name == "hone.__version__":
            continue
        if own == "models" or other == "models":
            assert own in ("compiler", "cli"), f"{path.name} imports {name}"
            continue
        if name == "hone.errors" or name.startswith("hone.errors."):
            continue
        assert RANK[other] <= RANK[own], f"{path.relative_to(ROOT)} imports {name}"


def test_back_edge_is_seen() -> None:
    assert room_of("hone.driver.compile") == "compiler"
    assert room_of("hone.errors.HoneError") is None
    assert RANK["compiler"] > RANK["targets"]


def test_every_package_is_listed_for_installation() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join([name, *path.parent.relative_to(ROOT / room).parts])
        for room, name in ROOMS.items()
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert set(settings["packages"]) == found


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("hone", ("tvm", "tvm_ffi", "onnx", "numpy", "pydantic")),
        ("hone.cli.main", ("tvm", "tvm_ffi", "onnx", "numpy", "pydantic", "rich")),
        ("hone.runtime", ("tvm", "onnx", "onnxruntime")),
        ("hone.verify", ("tvm", "onnx", "onnxruntime")),
        ("hone.targets.target", ("tvm", "onnx", "numpy")),
        ("hone.models", ("tvm",)),
        ("hone.recipe", ("tvm", "onnx", "onnxruntime")),
        ("hone.report.schema", ("tvm", "onnx", "onnxruntime")),
    ],
)
def test_import_stays_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
