"""Files that are damaged, foreign, or made to execute code: ``fxfact.load`` refuses them and executes nothing."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import FileError
from tests.support import ENTRIES, rewrite_archive, with_entries


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 16, 3, stride=2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small(x: Tensor) -> nn.Module:
    return fxfact.factorize(Net().eval(), "tucker", rank=0.4, example_inputs=x)


@pytest.fixture(scope="module")
def program(x: Tensor) -> torch.export.ExportedProgram:
    exported = torch.export.export(Net().eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    return fxfact.factorize(exported, "tucker", rank=0.4)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self._mark,))


def payload(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(mark), buffer)
    return buffer.getvalue()


def test_pickle_in_a_state_dict_file_is_not_executed(small: nn.Module, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "small.pt"
    torch.save({"fxfact": "{}", "state": small.state_dict(), "more": Payload(mark)}, path)
    with pytest.raises(FileError, match="more than tensors"):
        fxfact.load(path, Net())
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(FileError, match="can be read"):
        fxfact.load(path, Net())
    assert not mark.exists()


def test_hostile_members_of_a_program_are_refused(program: torch.export.ExportedProgram, tmp_path: Path) -> None:
    path, mark = tmp_path / "small.pt2", tmp_path / "mark"
    fxfact.save(program, path)
    whole = path.read_bytes()

    def refused(words: str, change: Callable[[str, bytes], bytes], added: dict[str, bytes] | None = None) -> None:
        path.write_bytes(whole)
        rewrite_archive(path, change, added)
        with pytest.raises(FileError, match=words):
            fxfact.load(path)
        assert not mark.exists()

    refused("more than tensors", lambda name, data: payload(mark) if "sample_inputs" in name else data)
    hostile = f"__import__('pathlib').Path('{mark}').touch()"
    symbol = json.dumps(hostile).encode()
    refused("is not a size", lambda name, data: data.replace(b'"Symbol(', b'"exec(') if "models/" in name else data)
    refused(
        "is not a size",
        lambda name, data: (
            data.replace(b'"expr_str": "', b'"expr_str": ' + symbol + b', "old": "') if "models/" in name else data
        ),
    )
    refused("not part of a plain", lambda name, data: data, {"data/aotinductor/model/a.so": b"\x7fELF"})
    refused("not part of a plain", lambda name, data: data, {"data/constants/custom_obj_0": payload(mark)})
    refused("plans .* cannot be read", lambda name, data: b"[]" if name.endswith("fxfact.json") else data)
    refused("cannot read|damaged", lambda name, data: b"{" if "models/" in name else data)


def hide_code(mark: Path, place: str) -> Callable[[str, bytes], bytes]:
    """A change of a program's file that makes PyTorch touch ``mark`` when it reads or runs the program."""
    code = f"__import__('pathlib').Path('{mark}').touch()"

    def change(name: str, data: bytes) -> bytes:
        if place == "weight" and "/data/weights/" in name:
            return as_pickled(data) if name.endswith(".json") else payload(mark)
        if "/models/" not in name:
            return data
        model = json.loads(data)
        graph = model["graph_module"]["graph"]
        signature = model["graph_module"]["signature"]
        if place == "input":
            return data.replace(b'"x"', json.dumps(f"x={code}").encode())
        if place == "operator":
            node = next(node for node in graph["nodes"] if node["target"] == "torch.ops.aten.relu.default")
            node["target"] = "torch.os.system"
            node["inputs"] = [{"name": "", "arg": {"as_string": f"touch {mark}"}, "kind": 1}]
        if place == "parameter":
            path = f'first.weight", {code}) if 1 else (("'
            first = next(each for each in signature["input_specs"] if "parameter" in each)
            first["parameter"]["parameter_name"] = path
        if place == "guard":
            model["guards_code"] = [f"{code} is None"]
        if place == "argument":
            for call in model["graph_module"]["module_call_graph"]:
                if call["signature"]:
                    call["signature"]["forward_arg_names"] = [f"x={code}"]
        return json.dumps(model).encode()

    def as_pickled(data: bytes) -> bytes:
        config = json.loads(data)
        for each in config["config"].values():
            each["use_pickle"] = True
        return json.dumps(config).encode()

    return change


@pytest.mark.parametrize("place", ["weight", "input", "operator", "parameter", "guard", "argument"])
def test_code_hidden_in_a_program_is_refused(program: torch.export.ExportedProgram, tmp_path: Path, place: str) -> None:
    path, mark = tmp_path / "small.pt2", tmp_path / "mark"
    fxfact.save(program, path)
    rewrite_archive(path, hide_code(mark, place))
    with pytest.raises(FileError, match=r"The file was not read\.$"):
        fxfact.load(path)
    assert not mark.exists()


def test_member_that_is_there_twice_is_refused(program: torch.export.ExportedProgram, tmp_path: Path) -> None:
    path = tmp_path / "small.pt2"
    fxfact.save(program, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(FileError, match="twice"):
        fxfact.load(path)


@pytest.mark.parametrize("kind", ["module", "program"])
def test_damaged_files_are_refused(
    program: torch.export.ExportedProgram, small: nn.Module, x: Tensor, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "small"
    fxfact.save(program if kind == "program" else small, path)
    model = Net().eval() if kind == "module" else None
    whole = path.read_bytes()
    for part in range(0, 20):
        path.write_bytes(whole[: len(whole) * part // 20])
        with pytest.raises(FileError, match="small"):
            fxfact.load(path, model)
    for place in range(40, len(whole), len(whole) // 20):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            again = fxfact.load(path, model)
        except FileError:
            continue
        network = again.module() if kind == "program" else again  # the byte had no meaning
        assert torch.isfinite(network(x)).all()


@pytest.mark.parametrize("damage", ENTRIES)
def test_wrong_entries_of_an_archive_are_refused(small: nn.Module, tmp_path: Path, damage: tuple[int, int]) -> None:
    path = tmp_path / "small"
    fxfact.save(small, path)
    path.write_bytes(with_entries(path.read_bytes(), *damage))
    with pytest.raises(FileError, match=r"can be read|is damaged"):
        fxfact.load(path, Net())


@pytest.mark.parametrize("content", [b"", b"hello", json.dumps({"format": "fxfact plan"}).encode()])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(FileError, match="can be read"):
        fxfact.load(path, Net())
    torch.save(Net().state_dict(), path)
    with pytest.raises(FileError, match="load_state_dict"):
        fxfact.load(path, Net())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(FileError):
        fxfact.load(path, Net())
    with pytest.raises(FileError, match="no such file"):
        fxfact.load(tmp_path / "nowhere", Net())
