"""The structure of the package: imports go strictly down, without circles, and never inside a function."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fxfact

ROOT = Path(fxfact.__file__).parent
# Bottom first: the rooms and modules of the house. Each imports only what stands below it.
FLOORS = [
    ["errors"],
    ["utils"],
    ["conv"],
    ["factorizations", "graph"],
    ["nn"],
    ["capture"],
    ["calibration"],
    ["planning"],
    ["passes"],
    ["compile_backend"],
    ["analysis"],
    ["search"],
    ["finetune"],
    ["api"],
    ["serialization"],
    ["cli"],
    ["__main__", ""],
]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(ROOT.rglob("*.py"))
}


def floor_of(module: str) -> int:
    room = module.split(".", maxsplit=1)[0]
    for level, names in enumerate(FLOORS):
        if room in names:
            return level
    raise AssertionError(f"fxfact.{room} stands on no floor: add it to FLOORS")


def imports_of(path: Path) -> list[tuple[str, int]]:
    """The modules of ours that a file imports, and the indentation of the import."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fxfact":
            base = (node.module or "").removeprefix("fxfact").lstrip(".")
            offered = getattr(importlib.import_module(f"fxfact.{base}"), "__all__", ()) if base else ()
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                is_module = name in MODULES and alias.name not in offered  # a function may have its module's name
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
        assert indentation == 0, f"fxfact.{module} imports fxfact.{imported} inside a function"
        if imported.split(".")[0] != room:
            assert floor_of(imported) < floor_of(module), f"fxfact.{module} imports fxfact.{imported} from above"
            assert "." not in imported, f"fxfact.{module} imports fxfact.{imported}, not the room that offers it"


def test_no_two_modules_of_a_room_import_each_other() -> None:
    graph = {module: {name for name, _ in imports_of(path)} - {module} for module, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert len(order) >= len(MODULES)


def test_mathematics_and_graphs_do_not_know_each_other() -> None:
    for module, path in MODULES.items():
        imported = {name for name, _ in imports_of(path)}
        if module.startswith("factorizations"):
            assert not {name for name in imported if name.startswith("graph")}
            assert "torch.fx" not in path.read_text(encoding="utf-8")
        if module.startswith("graph"):
            assert not {name for name in imported if name.startswith("factorizations")}


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert len(source.splitlines()) - _docstring_lines(tree) <= 310
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = [statement for statement in node.body if not _is_docstring(statement)]
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= 40, f"fxfact.{module}.{node.name} has {length} lines"


def test_no_public_function_has_the_name_of_a_module() -> None:
    functions = {name for name in fxfact.__all__ if callable(getattr(fxfact, name))}
    assert not functions & set(MODULES)


def _docstring_lines(tree: ast.Module) -> int:
    bodies = [n.body for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return sum((b[0].end_lineno or 0) - b[0].lineno + 1 for b in bodies if b and _is_docstring(b[0]))


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
