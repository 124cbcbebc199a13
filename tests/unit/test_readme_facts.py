"""The README's commands, tables, map and links agree with the repository. Its code runs in tests/integration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fxfact
from fxfact.factorizations import FACTORIZATIONS

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fxfact.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREENS = "\n".join(README.splitlines()[:150])
PAGES = ["README.md", "benchmarks/README.md", ".github/CONTRIBUTING.md"]


def rooms() -> set[str]:
    """The folders and modules of the package."""
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    return found - {"__init__", "__main__"}


def anchors(text: str) -> list[str]:
    """The anchors that GitHub makes from headings."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_ci_runs_exactly_the_second_command() -> None:
    commands = re.findall(r"```console\n(.*?)\n```", README)
    assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands[0].endswith("fxfact demo")


def test_first_screens_are_enough_to_use_it() -> None:
    call, install, commands, quickstart, wishes = (
        FIRST_SCREENS.index(words)
        for words in (
            "factorize(model, budget=fxfact.Macs(0.5), calibration=loader)",
            "pip install .",
            "fxfact demo",
            "## Quickstart",
            "## What you want, and what you type",
        )
    )
    assert call < install < commands < quickstart < wishes < FIRST_SCREENS.index("## Contents")
    for name in ("Macs", "Params", "Latency", "Loss", "Metric", "Speedup"):
        assert f"fxfact.{name}(" in FIRST_SCREENS


def test_quickstart_needs_nothing_but_torch_and_fxfact() -> None:
    block = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    assert set(re.findall(r"^(?:import|from) (\w+)", block, flags=re.MULTILINE)) == {"torch", "fxfact"}
    assert "budget=" in block
    assert "calibration=" in block


def test_first_screens_say_where_things_are() -> None:
    for path in ("graph/match.py", "planning/allocation.py", "planning/budgets.py", "api.py"):
        assert f"`{path}`" in FIRST_SCREENS
        assert (PACKAGE / path).exists()


def test_table_names_every_factorization() -> None:
    assert all(f"| `{kind.name}`" in README or f"`{kind.name}` |" in README for kind in FACTORIZATIONS)


def test_map_names_every_room() -> None:
    text = README.split("## How it is built")[1].split("### Add a factorization")[0]
    first_cells = "".join(re.findall(r"^\|(.*?)\|", text, flags=re.MULTILINE))
    assert set(re.findall(r"`(\w+)(?:/|\.py)`", first_cells)) == rooms()


def test_package_docstring_names_every_room() -> None:
    assert set(re.findall(r"^    (\w+)  ", fxfact.__doc__ or "", flags=re.MULTILINE)) == rooms()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    local = [(path, anchor) for path, anchor in links if "://" not in path]
    assert local
    for path, anchor in local:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), anchor


def test_contribution_rules_name_files_that_exist() -> None:
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:fxfact|tests)/[\w/]+(?:\.py|/))`", text)
    assert len(paths) > 10
    assert all((ROOT / path).exists() for path in paths)


def test_collapsible_recipes_are_closed() -> None:
    assert README.count("<details><summary>") == README.count("</details>") > 8
