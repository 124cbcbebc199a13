"""The house: imports go strictly down, or to the own folder's base. No circle, no import inside a function."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fxfact

ROOT = Path(fxfact.__file__).parent
# Bottom first. A name stands for a module, or for a folder whose modules import only what is below it and its base.
FLOORS = [
    ["errors", "precision", "skip"],
    ["conv", "tensor", "activations", "executing", "kernels", "progress", "timing", "writing"],
    ["cost", "metric", "conv_modules", "spellings", "comparing", "copying"],
    ["sites", "folding", "stand_ins"],
    ["factorizations.stages", "factorizations.weights"],
    ["factorizations", "graph.base"],
    ["graph.match"],
    ["graph.contract", "graph.fold", "graph.fuse", "graph.lift", "graph.shapes", "graph.splice"],
    ["capture.base", "capture.memory", "capture.surroundings"],
    ["capture.guard", "capture.losses"],
    ["capture.observe"],
    ["capture.reference", "capture.trace", "capture.modules", "capture.exported"],
    ["capture.ladder"],
    ["calibration.base"],
    ["calibration.likelihood", "calibration.batches", "calibration.moments"],
    ["calibration.collecting"],
    ["calibration.measuring"],
    ["latency.frozen", "latency.kept"],
    ["latency.clock"],
    ["ranks.base", "ranks.budgets", "ranks.knapsack", "ranks.bearing", "nn"],
    ["ranks.rules", "ranks.clocking"],
    ["ranks.requested"],
    ["ranks.within_budget"],
    ["ranks"],
    ["planning.curve", "planning.decision"],
    ["planning.base"],
    ["planning"],
    ["passes.base", "passes.decomposing"],
    ["passes.factorize_convs", "passes.for_inference", "passes.swap_convs"],
    ["passes.carrying_out"],
    ["verification", "inference"],
    [
        "trying",
        "rehearsing",
        "compile_backend",
        "files.base",
        "files.harmless",
        "inspection",
        "pairs",
        "repairs.looking",
        "repairs.solving",
        "repairs.walking",
    ],
    ["choosing", "recovery", "repairs", "reporting.base"],
    ["reporting.flow", "reporting.svg"],
    ["reporting.dot", "reporting.page"],
    ["reporting.making"],
    ["api"],
    ["files.states", "files.programs"],
    ["files.doors"],
    ["demo"],
    ["cli.base"],
    ["cli.showing"],
    ["cli.commands"],
    ["cli.parsing"],
    ["__main__", ""],
]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(ROOT.rglob("*.py"))
}


def floor_of(module: str) -> int:
    for level, names in enumerate(FLOORS):
        if any(module == name or (name and module.startswith(f"{name}.")) for name in names):
            return level
    if own := [name for name in MODULES if name.startswith(f"{module}.")]:
        return max(map(floor_of, own))  # a folder's door shows what its topmost module gives
    raise AssertionError(f"fxfact.{module} stands on no floor: add it to FLOORS")


def imports_of(path: Path) -> list[tuple[str, int]]:
    """The modules of ours that a file imports, and the indentation of the import."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fxfact":
            base = (node.module or "").removeprefix("fxfact").lstrip(".")
            names = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            found += [(name if name in MODULES else base, node.col_offset) for name in names]
        if isinstance(node, ast.Import):
            found += [
                (a.name.removeprefix("fxfact").lstrip("."), node.col_offset) for a in node.names if "fxfact" in a.name
            ]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_strictly_down_or_to_the_own_base(module: str) -> None:
    path = MODULES[module]
    folder = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for imported, indentation in imports_of(path):
        assert indentation == 0, f"fxfact.{module} imports fxfact.{imported} inside a function"
        assert imported != module
        own_room = folder != "" and imported.startswith(f"{folder}.")
        if own_room and (path.name == "__init__.py" or imported == f"{folder}.base"):
            continue
        assert floor_of(imported) < floor_of(module), (
            f"fxfact.{module} imports fxfact.{imported}, which is not below it"
        )


def test_mathematics_and_graphs_do_not_know_each_other() -> None:
    for module, path in MODULES.items():
        imported = {name for name, _ in imports_of(path)}
        if module.startswith(("factorizations", "tensor")):
            assert not {name for name in imported if name.startswith("graph")}
            assert "torch.fx" not in path.read_text(encoding="utf-8")
        if module.startswith("graph"):
            assert not {name for name in imported if name.startswith(("factorizations", "tensor"))}


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = [statement for statement in node.body if not _is_docstring(statement)]
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= 40, f"fxfact.{module}.{node.name} has {length} lines"


def test_no_public_function_has_the_name_of_a_module() -> None:
    functions = {name for name in fxfact.__all__ if callable(getattr(fxfact, name))}
    assert not functions & set(MODULES)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
