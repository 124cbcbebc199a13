"""What differs between equal exported programs, and is removed from their files."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxfact.utils import reproducible_archive
from tests.support import Small


def exported(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (torch.randn(1, 4, 8, 8),)), buffer)
    return buffer


def model_in(archive: Any) -> Any:
    with zipfile.ZipFile(archive) as opened:
        return json.loads(opened.read("archive/models/model.json"))


def with_metadata(archive: io.BytesIO, metadata: dict[str, str]) -> io.BytesIO:
    """The archive with other metadata at every node."""
    changed = io.BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("model.json"):
                model = json.loads(data)
                for node in model["graph_module"]["graph"]["nodes"]:
                    node["metadata"] |= metadata
                data = json.dumps(model).encode()
            target.writestr(name, data)
    return changed


@pytest.fixture(scope="module")
def archive() -> bytes:
    return exported(Small()).getvalue()


def test_archive_is_read_as_before_and_is_rewritten_to_itself(archive: bytes) -> None:
    first = io.BytesIO(reproducible_archive(io.BytesIO(archive)))
    x = torch.randn(1, 4, 8, 8)
    programs = [torch.export.load(each) for each in (io.BytesIO(archive), first)]
    assert programs[1].module()(x).equal(programs[0].module()(x))
    assert bytes(reproducible_archive(first)) == first.getvalue()
    names = [zipfile.ZipFile(each).namelist() for each in (io.BytesIO(archive), first)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            {"stack_trace": 'File "/home/a/net.py", line 3, in f\n  x'},
            {"stack_trace": 'File "/b/net.py", line 3, in f\n  x'},
        ),
        ({"stack_trace": 'File "<eval_with_key>.3", line 1'}, {"stack_trace": 'File "<eval_with_key>.12", line 1'}),
        (
            {"from_node": '[{"name": "a", "graph_id": 1402, "from_node": [{"name": "b", "graph_id": 7}]}]'},
            {"from_node": '[{"name": "a", "graph_id": 31, "from_node": [{"name": "b", "graph_id": 9}]}]'},
        ),
    ],
    ids=["folder", "counter", "address"],
)
def test_what_differs_between_runs_is_removed(archive: bytes, one: dict[str, str], other: dict[str, str]) -> None:
    ones, others = (reproducible_archive(with_metadata(io.BytesIO(archive), each)) for each in (one, other))
    assert bytes(ones) == bytes(others)


def test_what_differs_between_programs_is_kept(archive: bytes) -> None:
    texts = ('File "/a/net.py", line 3', 'File "/a/net.py", line 4', 'File "/a/other.py", line 3')
    sources = [with_metadata(io.BytesIO(archive), {"stack_trace": text}) for text in texts]
    assert len({bytes(reproducible_archive(source)) for source in sources}) == len(texts)
    histories = [
        '[{"graph_id": 5, "from_node": [{"graph_id": 5}]}]',
        '[{"graph_id": 5, "from_node": [{"graph_id": 6}]}]',
    ]
    sources = [with_metadata(io.BytesIO(archive), {"from_node": text}) for text in histories]
    assert len({bytes(reproducible_archive(source)) for source in sources}) == len(histories)


def test_files_in_stack_traces_keep_their_place_in_their_package(archive: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "package" / "inner"
    folder.mkdir(parents=True)
    for each in (folder, folder.parent):
        (each / "__init__.py").touch()
    text = f'File "{folder}/net.py", line 3, in f\n  File "{tmp_path}/main.py", line 1'
    rewritten = reproducible_archive(with_metadata(io.BytesIO(archive), {"stack_trace": text}))
    (found,) = {
        node["metadata"]["stack_trace"] for node in model_in(io.BytesIO(rewritten))["graph_module"]["graph"]["nodes"]
    }
    assert found == 'File "package/inner/net.py", line 3, in f\n  File "main.py", line 1'
