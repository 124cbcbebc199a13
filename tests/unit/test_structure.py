"""The structure of the package: imports go strictly down and never in a circle; files and functions stay short."""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fxfact

ROOT = Path(fxfact.__file__).parent
TESTS = Path(__file__).parents[1]
# The rooms and modules of the package, bottom first. Each imports only from lower levels.
LEVELS = [
    ["errors"],
    ["utils"],
    ["conv"],
    ["factorizations", "graph"],
    ["nn"],
    ["capture", "transduction"],
    ["calibration"],
    ["planning"],
    ["passes"],
    ["compile_backend"],
    ["analysis"],
    ["finetune"],
    ["search"],
    ["api"],
    ["serialization"],
    ["cli", "public"],
    ["__main__", ""],
]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(ROOT.rglob("*.py"))
}
ROOMS = [module for module, path in MODULES.items() if path.name == "__init__.py"]


def level_of(module: str) -> int:
    room = module.split(".", maxsplit=1)[0]
    for level, names in enumerate(LEVELS):
        if room in names:
            return level
    raise AssertionError(f"fxfact.{room} has no level: add it to LEVELS")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path: Path) -> list[tuple[str, int]]:
    """Return the modules of the package that a file imports, and the indentation of each import."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fxfact":
            base = (node.module or "").removeprefix("fxfact").lstrip(".")
            exported = getattr(importlib.import_module(f"fxfact.{base}"), "__all__", ()) if base else ()
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                is_module = name in MODULES and alias.name not in exported  # a function may have its module's name
                found.append((name if is_module else base, node.col_offset))
        if isinstance(node, ast.Import):
            found += [
                (a.name.removeprefix("fxfact").lstrip("."), node.col_offset) for a in node.names if "fxfact" in a.name
            ]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_strictly_down(module: str) -> None:
    room = module.split(".", maxsplit=1)[0]
    for imported, indentation in imports_of(MODULES[module]):
        assert indentation == 0 or module == "", f"fxfact.{module} imports fxfact.{imported} inside a function"
        if imported.split(".")[0] != room:
            assert level_of(imported) < level_of(module), f"fxfact.{module} imports fxfact.{imported} from above"
            assert "." not in imported, f"fxfact.{module} imports fxfact.{imported} instead of the room"


def test_imports_have_no_circle() -> None:
    graph = {module: {name for name, _ in imports_of(path)} - {module} for module, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert len(order) >= len(MODULES)


def test_factorizations_and_graphs_do_not_import_each_other() -> None:
    for module, path in MODULES.items():
        imported = {name for name, _ in imports_of(path)}
        if module.startswith("factorizations"):
            assert not {name for name in imported if name.startswith("graph")}
            assert "torch.fx" not in path.read_text(encoding="utf-8")
        if module.startswith("graph"):
            assert not {name for name in imported if name.startswith("factorizations")}


@pytest.mark.parametrize("room", ROOMS)
def test_room_exports_names_that_exist(room: str) -> None:
    exporting = importlib.import_module(f"fxfact.{room}".rstrip("."))
    exported = getattr(exporting, "__all__", ())
    assert not [name for name in exported if not hasattr(exporting, name)]
    assert len(set(exported)) == len(exported)


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module: str) -> None:
    source, tree = MODULES[module].read_text(encoding="utf-8"), tree_of(MODULES[module])
    assert len(source.splitlines()) - _docstring_lines(tree) <= 310
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = [statement for statement in node.body if not _is_docstring(statement)]
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= 40, f"fxfact.{module}.{node.name} has {length} lines"


def test_no_public_function_has_the_name_of_a_module() -> None:
    functions = {name for name in fxfact.__all__ if callable(getattr(fxfact, name))}
    assert not functions & set(MODULES)


def test_test_files_have_unique_names_and_do_not_import_each_other() -> None:
    files = sorted(TESTS.rglob("*.py"))
    names = Counter(path.name for path in files if path.name != "conftest.py")
    assert not [name for name, count in names.items() if count > 1]
    for path in files:
        imported = {node.module or "" for node in ast.walk(tree_of(path)) if isinstance(node, ast.ImportFrom)}
        assert not [name for name in imported if name.rsplit(".", maxsplit=1)[-1].startswith("test_")], path


def _docstring_lines(tree: ast.Module) -> int:
    bodies = [n.body for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return sum((b[0].end_lineno or 0) - b[0].lineno + 1 for b in bodies if b and _is_docstring(b[0]))


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
