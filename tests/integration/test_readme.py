"""The README says what is true: its Python runs, CI runs its second command, its map names what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fxfact
from benchmarks.networks import data_folder
from fxfact.factorizations import FACTORIZATIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(data_folder() is None, reason="trained weights are not here: set FXFACT_DATA to their folder")
def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FXFACT_CACHE", str(tmp_path))
    room: dict[str, object] = {}
    before, after = README.split("## Use it with\n")  # whose pages are run one by one, in test_recipes
    blocks = re.findall(r"```python\n(.*?)```", before + after.split("\n## ", 1)[1], flags=re.DOTALL)
    assert len(blocks) >= 8
    for block in blocks:
        exec(block, room)
    assert "layer3.0.conv2" in capsys.readouterr().out


def test_ci_runs_exactly_its_second_command() -> None:
    commands = re.findall(r"```console\n(.*?)\n```", README)
    assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands[0].endswith("fxfact demo")


def test_its_table_names_every_factorization() -> None:
    assert all(f"`{kind.name}`" in README for kind in FACTORIZATIONS)


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_its_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", (ROOT / page).read_text(encoding="utf-8"))
    within = [(path, anchor) for path, anchor in links if "://" not in path]
    assert len(within) >= 5
    for path, anchor in within:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in _anchors(target.read_text(encoding="utf-8")), anchor


def _anchors(text: str) -> list[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_its_map_names_every_room() -> None:
    package = Path(fxfact.__file__).parent
    rooms = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    fxmap = README.split("## How it is built")[1].split("## Tests")[0]
    assert all(re.search(rf"\b{room}\b", fxmap) for room in rooms - {"__init__"})
