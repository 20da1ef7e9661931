"""The import rules of the design, read off the source; nothing is imported.

Everybody may import ``optc.errors``, the one error hierarchy, which imports nothing.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("optc", "ir", "frontend", "passes", "autotune", "backends", "runtime", "training")
MAY_IMPORT = {
    "optc": {"frontend", "passes", "autotune", "backends", "runtime", "training", "ir"},
    "frontend": {"ir"},
    "autotune": {"backends", "ir", "runtime"},
    "passes": {"ir"},
    # The artifact's format has one definition, shared by its writer (backends) and its reader (runtime).
    "backends": {"ir", "runtime"},
    "ir": set(),
    "runtime": set(),
    "training": {"passes", "ir"},
}
FORBIDDEN_EXTERNAL = {
    "runtime": {"tvm", "onnx", "onnx_ir", "torch", "sympy", "networkx", "rich", "click"},
    "ir": {"tvm", "torch"},
    "passes": {"tvm", "torch"},
    "frontend": {"tvm"},
    "backends": {"torch"},
    "autotune": {"torch"},
    "training": {"tvm", "onnx", "onnx_ir"},
}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "optc":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "optc"


def complaints(room: str, names: set[str]) -> list[str]:
    bad = []
    for name in sorted(names):
        target = room_of(name)
        if target is None:
            if name.split(".")[0] in FORBIDDEN_EXTERNAL.get(room, set()) | set(ROOMS) - {"optc"}:
                bad.append(name)
        elif target not in {room} | MAY_IMPORT[room] and not name.startswith("optc.errors"):
            bad.append(name)
    return bad


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room):
    bad = {str(p.relative_to(ROOT)): c for p in modules(room) if (c := complaints(room, imported(p)))}
    assert not bad


def test_the_rules_catch_a_violation():
    assert complaints("runtime", {"optc.ir"}) == ["optc.ir"]
    assert complaints("passes", {"optc.backends.lowering.table"}) == ["optc.backends.lowering.table"]
    assert complaints("runtime", {"optc.backends.artifact"}) == ["optc.backends.artifact"]
    assert complaints("runtime", {"tvm.relax"}) == ["tvm.relax"]
    assert complaints("ir", {"ir.verify"}) == ["ir.verify"]
    assert not complaints("backends", {"optc.runtime.format", "optc.errors", "tvm"})


@pytest.mark.parametrize("path", [p for room in ROOMS for p in modules(room)], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_stays_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
