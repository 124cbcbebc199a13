"""Files: what is written comes back, whole or not at all, and nothing in a file is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import ArgumentTypeError, FileError, FxfactError, PlanError
from fxfact.factorizations import Tucker
from fxfact.utils.pt2_safety import _GUARD, _is_arithmetic, _is_operator
from tests.support import ENTRIES, with_entries


class Net(nn.Module):
    def __init__(self, width: int = 12, *, normed: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 16, 3, stride=2)
        if normed:
            nn.utils.parametrizations.weight_norm(self.second)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)))


def net(seed: int = 0, **options: Any) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Net(**options)
        made.norm.running_mean.normal_()
        return made.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def program(x: Tensor) -> torch.export.ExportedProgram:
    exported = torch.export.export(net(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    return fxfact.factorize(exported, "tucker", rank=0.4)


@pytest.mark.parametrize("capture", ["trace", "modules"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_comes_back_into_another_instance(
    x: Tensor, tmp_path: Path, capture: Any, dtype: torch.dtype
) -> None:
    x, path = x.to(dtype), tmp_path / "small.pt"
    small = fxfact.factorize(net().to(dtype), "tucker", rank=0.4, example_inputs=x, capture=capture)
    fxfact.save(small, path)
    other = net(1).to(dtype)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    again = fxfact.load(path, other)
    assert torch.equal(again(x), small(x))
    assert fxfact.plan_of(again) == fxfact.plan_of(small)
    errors = [[row.relative_error for row in fxfact.inspect(each).rows] for each in (again, small)]
    assert errors[0] == errors[1]
    assert any(error for error in errors[0])
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_network_that_was_factorized_twice_and_one_with_folded_weights(x: Tensor, tmp_path: Path) -> None:
    once = fxfact.factorize(net(normed=True), "channel_svd", rank=0.6, example_inputs=x, fold_weights=True)
    twice = fxfact.factorize(once, "pointwise_svd", rank=0.7, include="*", allow_growth=True)
    assert fxfact.plan_of(twice).rewrites
    for network in (once, twice):
        fxfact.save(network, tmp_path / "small.pt")
        again = fxfact.load(tmp_path / "small.pt", net(1, normed=True))
        assert torch.equal(again(x), network(x))


class Own(Tucker):
    """A factorization that fxfact does not know."""

    name = "own"


def test_factorizations_of_ones_own_come_back_where_they_are_named(x: Tensor, tmp_path: Path) -> None:
    small = fxfact.factorize(net(), Own(), rank=0.5)
    fxfact.save(small, tmp_path / "small.pt")
    fxfact.plan_of(small).save(tmp_path / "plan.json")
    with pytest.raises(FxfactError, match="factorizations="):
        fxfact.load(tmp_path / "small.pt", net(1))
    with pytest.raises(PlanError, match="factorizations="):
        fxfact.Plan.load(tmp_path / "plan.json")
    assert fxfact.load(tmp_path / "small.pt", net(1), factorizations=[Own])(x).equal(small(x))
    assert fxfact.Plan.load(tmp_path / "plan.json", factorizations=[Own]) == fxfact.plan_of(small)


def test_a_recovered_network_comes_back(x: Tensor, tmp_path: Path) -> None:
    model = net()
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=x)
    tuned, _ = fxfact.distill(small, model, torch.randn(16, 3, 9, 9).split(4), steps=20, lr=1e-2)
    fxfact.save(tuned, tmp_path / "small.pt")
    assert torch.equal(fxfact.load(tmp_path / "small.pt", net(1))(x), tuned(x))


def test_a_program_comes_back_here_and_in_pytorch(
    program: torch.export.ExportedProgram, x: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "small.pt2"
    fxfact.save(program, path)
    expected = program.module()(x)
    again = fxfact.load(path)
    assert torch.equal(again.module()(x), expected)
    assert torch.equal(torch.export.load(path).module()(x), expected)
    assert again.module()(torch.cat([x, x, x])).shape == (6, 4)
    assert fxfact.plan_of(again) == fxfact.plan_of(program)
    assert [row.relative_error for row in fxfact.inspect(again).rows] == [
        row.relative_error for row in fxfact.inspect(program).rows
    ]
    plain = tmp_path / "plain.pt2"
    torch.export.save(program, plain)  # without a word of ours
    assert torch.equal(fxfact.load(plain).module()(x), expected)
    with pytest.raises(FileError, match="needs no model"):
        fxfact.load(path, net())


def test_another_model_is_refused_with_the_first_differences(x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    fxfact.save(fxfact.factorize(net(), "tucker", rank=0.4, example_inputs=x, exclude="first"), path)
    with pytest.raises(PlanError, match=r"first: the plan has .*, the model .*"):
        fxfact.load(path, net(width=10))
    wider = net()
    wider.head = nn.Linear(16, 5)
    with pytest.raises(FileError, match=r"head.weight: the file has float32 \(4, 16\), the model float32 \(5, 16\)"):
        fxfact.load(path, wider)
    with pytest.raises(FileError, match=r"float32 .*, the model float64"):
        fxfact.load(path, net().double())
    with pytest.raises(FileError, match="Pass the model"):
        fxfact.load(path)
    with pytest.raises(ArgumentTypeError):
        fxfact.load(path, "resnet")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError):
        fxfact.save("resnet", path)  # type: ignore[arg-type]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self._mark,))


def rewritten(path: Path, change: Callable[[str, bytes], bytes], added: dict[str, bytes] | None = None) -> None:
    """The same archive, each part changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(parts)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, change(name, data))
        for name, data in (added or {}).items():
            archive.writestr(f"{folder}/{name}", data)


def test_a_pickle_in_a_file_is_not_executed(x: Tensor, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "small.pt"
    state = fxfact.factorize(net(), "tucker", rank=0.4, example_inputs=x).state_dict()
    torch.save({"fxfact": "{}", "state": state, "more": Payload(mark)}, path)
    with pytest.raises(FileError, match="more than tensors"):
        fxfact.load(path, net())
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(FileError, match="can be read"):
        fxfact.load(path, net())
    assert not mark.exists()


def payload(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(mark), buffer)
    return buffer.getvalue()


def test_nothing_in_a_program_is_executed(program: torch.export.ExportedProgram, tmp_path: Path) -> None:
    path, mark = tmp_path / "small.pt2", tmp_path / "mark"
    fxfact.save(program, path)
    whole = path.read_bytes()

    def refused(words: str, change: Callable[[str, bytes], bytes], added: dict[str, bytes] | None = None) -> None:
        path.write_bytes(whole)
        rewritten(path, change, added)
        with pytest.raises(FileError, match=words):
            fxfact.load(path)
        assert not mark.exists()

    refused("more than tensors", lambda name, data: payload(mark) if "sample_inputs" in name else data)
    hostile = f"__import__('pathlib').Path('{mark}').touch()"
    symbol = json.dumps(hostile).encode()
    refused("is no size", lambda name, data: data.replace(b'"Symbol(', b'"exec(') if "models/" in name else data)
    refused(
        "is no size",
        lambda name, data: (
            data.replace(b'"expr_str": "', b'"expr_str": ' + symbol + b', "old": "') if "models/" in name else data
        ),
    )
    refused("no part of a plain", lambda name, data: data, {"data/aotinductor/model/a.so": b"\x7fELF"})
    refused("no part of a plain", lambda name, data: data, {"data/constants/custom_obj_0": payload(mark)})
    refused("does not say", lambda name, data: b"[]" if name.endswith("fxfact.json") else data)
    refused("cannot read|damaged", lambda name, data: b"{" if "models/" in name else data)


def hidden(mark: Path, way: str) -> Callable[[str, bytes], bytes]:
    """A change of a program's file after which PyTorch would touch ``mark``, on reading it or on running it."""
    code = f"__import__('pathlib').Path('{mark}').touch()"

    def change(name: str, data: bytes) -> bytes:
        if way == "weight" and "/data/weights/" in name:
            return pickled(data) if name.endswith(".json") else payload(mark)
        if "/models/" not in name:
            return data
        model = json.loads(data)
        graph = model["graph_module"]["graph"]
        signature = model["graph_module"]["signature"]
        if way == "input":
            return data.replace(b'"x"', json.dumps(f"x={code}").encode())
        if way == "operator":
            node = next(node for node in graph["nodes"] if node["target"] == "torch.ops.aten.relu.default")
            node["target"] = "torch.os.system"
            node["inputs"] = [{"name": "", "arg": {"as_string": f"touch {mark}"}, "kind": 1}]
        if way == "parameter":
            path = f'first.weight", {code}) if 1 else (("'
            first = next(each for each in signature["input_specs"] if "parameter" in each)
            first["parameter"]["parameter_name"] = path
        if way == "guard":
            model["guards_code"] = [f"{code} is None"]
        if way == "argument":
            for call in model["graph_module"]["module_call_graph"]:
                if call["signature"]:
                    call["signature"]["forward_arg_names"] = [f"x={code}"]
        return json.dumps(model).encode()

    def pickled(data: bytes) -> bytes:
        config = json.loads(data)
        for each in config["config"].values():
            each["use_pickle"] = True
        return json.dumps(config).encode()

    return change


@pytest.mark.parametrize("way", ["weight", "input", "operator", "parameter", "guard", "argument"])
def test_code_hidden_in_a_program_is_refused(
    program: torch.export.ExportedProgram, x: Tensor, tmp_path: Path, way: str
) -> None:
    path, mark = tmp_path / "small.pt2", tmp_path / "mark"
    fxfact.save(program, path)
    rewritten(path, hidden(mark, way))
    with pytest.raises(FileError, match=r"not read$"):
        fxfact.load(path)
    assert not mark.exists()


def test_a_part_that_is_there_twice_is_refused(program: torch.export.ExportedProgram, tmp_path: Path) -> None:
    path = tmp_path / "small.pt2"
    fxfact.save(program, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(FileError, match="twice"):
        fxfact.load(path)


def test_programs_with_names_dictionaries_and_branches_are_read(tmp_path: Path) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor, *, scale: Tensor, more: dict[str, Tensor]) -> dict[str, Tensor]:
            y = self.conv(x)
            with torch.no_grad():
                mean = y.mean((2, 3))
            y = torch.cond(mean.sum() > 0, lambda a: a + 1, lambda a: a - 1, (y,))
            return {"out put": y * scale, "size": more["a b"] + x.shape[0] * 2}

    given = {"scale": torch.ones(1), "more": {"a b": torch.ones(2)}}
    sizes = {"x": {0: torch.export.Dim("batch", min=2)}, "scale": None, "more": {"a b": None}}
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(Many().eval(), (x,), given, dynamic_shapes=sizes)
    fxfact.save(program, tmp_path / "many.pt2")
    again = fxfact.load(tmp_path / "many.pt2").module()(x, **given)
    torch.testing.assert_close(again, program.module()(x, **given))


@pytest.mark.parametrize(
    ("guard", "harmless"),
    [
        ("L['x'].size()[0] >= 2 and L['x'].size()[1] == 3", True),
        ("L['more']['a'].stride()[0] <= 2 * math.floor(L['x'].size()[2] / 4)", True),
        ("L['x'].tofile('name')", False),
        ("L.__class__", False),
        ("exec(L['x'])", False),
        ("L['x'].size()[0] == 1, '')\n  exec", False),
    ],
)
def test_which_guards_are_comparisons_of_sizes(guard: str, harmless: bool) -> None:
    assert bool(_GUARD.fullmatch(guard)) == harmless


@pytest.mark.parametrize(
    ("target", "harmless"),
    [
        ("torch.ops.aten.conv2d.default", True),
        ("torch.ops.higher_order.cond", True),
        ("torch.ops.unknown.operator.default", True),  # of which PyTorch says so
        ("_operator.add", True),
        ("math.trunc", True),
        ("torch.sym_not", True),
        ("torch.load", False),
        ("torch.ops.load_library", False),
        ("torch.ops.aten.conv2d.default.__init__", False),
        ("_operator.call", False),
        ("_operators.call", False),  # of which the reader looks at the beginning alone
        ("maths.__loader__.load_module", False),
        ("somebody.load", True),  # stays text, which PyTorch refuses
    ],
)
def test_which_targets_are_operators(target: str, harmless: bool) -> None:
    assert _is_operator(target) == harmless


def test_loading_what_was_not_factorized_leaves_the_model_alone(tmp_path: Path) -> None:
    one, other = net(0), net(1)
    before = other.first.weight.clone()
    fxfact.save(one, tmp_path / "dense.pt")
    again = fxfact.load(tmp_path / "dense.pt", other)
    assert again is not other
    assert other.first.weight.equal(before)
    assert again.first.weight.equal(one.first.weight)


def test_links_and_pipes_are_written_through(x: Tensor, tmp_path: Path) -> None:
    plan = fxfact.plan(net(), rank=0.4, example_inputs=x)
    real, link, pipe = (tmp_path / name for name in ("real.json", "link.json", "pipe"))
    real.write_text("old")
    link.symlink_to(real)
    plan.save(link)
    assert link.is_symlink()
    assert fxfact.Plan.load(real) == plan
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(pipe.read_text)
        plan.save(pipe)
        assert fxfact.Plan.from_json(json.loads(reading.result(timeout=60))) == plan
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("expression", "harmless"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Add(Mul(Integer(2), Symbol('u0', integer=True)), Integer(-1))", True),
        ("FloorDiv(s0, 2)", False),  # a bare symbol is no name of anybody's
        ("Max(Integer(1), FloorDiv(Symbol('s1'), Integer(2)))", True),
        ("eval(Symbol('s1'))", False),
        ("chr(95)", False),
        ("Symbol('__import__')", False),
        ("().__class__", False),
        ("Integer(1) if 1 else 2", False),
    ],
)
def test_which_expressions_are_sizes(expression: str, harmless: bool) -> None:
    assert _is_arithmetic(expression) == harmless


@pytest.mark.parametrize("kind", ["module", "program"])
def test_damaged_files_are_refused(program: torch.export.ExportedProgram, x: Tensor, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "small"
    if kind == "program":
        fxfact.save(program, path)
    else:
        fxfact.save(fxfact.factorize(net(), "tucker", rank=0.4, example_inputs=x), path)
    model = net() if kind == "module" else None
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
        network = again.module() if kind == "program" else again  # the byte was one that means nothing
        assert torch.isfinite(network(x)).all()


@pytest.mark.parametrize("damage", ENTRIES)
def test_entries_of_an_archive_that_say_something_else_are_refused(
    x: Tensor, tmp_path: Path, damage: tuple[int, int]
) -> None:
    path = tmp_path / "small"
    fxfact.save(fxfact.factorize(net(), "tucker", rank=0.4, example_inputs=x), path)
    path.write_bytes(with_entries(path.read_bytes(), *damage))
    with pytest.raises(FileError, match=r"can be read|is damaged"):
        fxfact.load(path, net())


def test_shared_parameters_of_a_model_without_numbers_stay_shared(x: Tensor, tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Conv2d(3, 12, 3, padding=1, bias=False)
            self.again.weight = self.first.weight
            self.head = nn.Linear(16, 16)
            self.head.bias = self.second.bias

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - self.again(x).mean(1, keepdim=True))

    small = fxfact.factorize(Tied().eval(), "tucker", rank=0.4, example_inputs=x)
    fxfact.save(small, tmp_path / "small")
    with torch.device("meta"):
        empty = Tied().eval()
    loaded = fxfact.load(tmp_path / "small", empty)
    assert loaded(x).equal(small(x))
    assert len(list(loaded.parameters())) == len(list(small.parameters())) < len(loaded.state_dict())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("content", [b"", b"hello", json.dumps({"format": "fxfact plan"}).encode()])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(FileError, match="can be read"):
        fxfact.load(path, net())
    torch.save(net().state_dict(), path)
    with pytest.raises(FileError, match="load_state_dict"):
        fxfact.load(path, net())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(FileError):
        fxfact.load(path, net())
    with pytest.raises(FileError, match="no such file"):
        fxfact.load(tmp_path / "nowhere", net())


def test_what_cannot_be_written_is_refused_and_leaves_nothing(x: Tensor, tmp_path: Path) -> None:
    small = fxfact.factorize(net(), "tucker", rank=0.4, example_inputs=x)
    with pytest.raises(FileError, match="cannot be written"):
        fxfact.save(small, tmp_path)
    with pytest.raises(FileError, match="cannot be written"):
        fxfact.save(small, tmp_path / "no" / "folder.pt")
    small.head.register_buffer("strange", torch.ones(2))
    small.head.get_extra_state = lambda: "a string"
    kind = type(small.head)
    small.head.__class__ = type("Strange", (kind,), {"get_extra_state": lambda self: "text"})
    with pytest.raises(FileError, match="only tensors"):
        fxfact.save(small, tmp_path / "small.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_network_is_loaded_into_a_model_without_memory(x: Tensor, tmp_path: Path) -> None:
    small = fxfact.factorize(net(), "tucker", rank=0.4, example_inputs=x)
    fxfact.save(small, tmp_path / "small.pt")
    with torch.device("meta"):
        empty = Net().eval()
    again = fxfact.load(tmp_path / "small.pt", empty)
    torch.testing.assert_close(again(x), small(x))
    assert all(parameter.requires_grad for parameter in again.parameters())
    with pytest.raises(FileError, match=r"\.pt2 is for exported programs"):
        fxfact.save(small, tmp_path / "small.pt2")


_UNKNOWN = """
import sys
import torch
from torch.utils import _pytree

class Out:
    def __init__(self, logits):
        self.logits = logits

_pytree.register_pytree_node(
    Out, lambda out: ([out.logits], None), lambda values, _: Out(*values), serialized_type_name="shop.window.Out"
)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return Out(self.conv(x))

torch.export.save(torch.export.export(Net().eval(), (torch.randn(1, 3, 8, 8),)), sys.argv[1])
"""


def test_a_program_whose_outputs_are_of_an_unknown_class_is_refused_with_the_way_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "net.pt2")
    subprocess.run([sys.executable, "-c", _UNKNOWN, path], check=True, capture_output=True)
    with pytest.raises(FileError, match=r"shop\.window\.Out.*--import shop\.window"):
        fxfact.load(path)
    assert "Traceback" not in capfd.readouterr().err


_KILLED = """
import os, random, signal, sys, time
import torch, fxfact
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
path = sys.argv[1]
model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3))
small = fxfact.factorize(model, "tucker", rank=0.5)
started = time.perf_counter()
fxfact.save(small, path)
took = time.perf_counter() - started
with torch.no_grad():
    first = {float(p.flatten()[0]) for p in small.parameters()}
random.seed(0)
killed = written = 0
for turn in range(100):
    child = os.fork()
    if not child:
        while True:
            for parameter in small.parameters():
                parameter.data.fill_(turn)
            fxfact.save(small, path)
    time.sleep(random.uniform(0, 4 * took))
    os.kill(child, signal.SIGKILL)
    killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with torch.no_grad():
        values = {float(p.flatten()[0]) for p in fxfact.load(path, model).parameters()}
    assert values == first or len(values) == 1, values
    written += len(values) == 1
print(killed, written > 10)
"""


def test_a_process_that_is_killed_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "small.pt")],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "100 True", done.stderr


def test_networks_for_inference_and_those_factorized_again_come_back(x: Tensor, tmp_path: Path) -> None:
    swapped = fxfact.factorize(net(), "tucker", rank=0.5, example_inputs=x, capture="modules")
    again = fxfact.factorize(swapped, "channel_svd", rank=0.5, example_inputs=x, allow_growth=True)
    for network in (again, fxfact.for_inference(swapped, x), fxfact.for_inference(again, x)):
        fxfact.save(network, tmp_path / "small.pt")
        loaded = fxfact.load(tmp_path / "small.pt", net(1))
        assert torch.equal(loaded(x), network(x))
        assert fxfact.plan_of(loaded) == fxfact.plan_of(network)


def test_what_is_no_path_is_refused(x: Tensor) -> None:
    with pytest.raises(ArgumentTypeError, match=r"path must be a str or os\.PathLike, got int"):
        fxfact.save(fxfact.factorize(net(), rank=0.5), 3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"path must be a str or os\.PathLike, got int"):
        fxfact.load(3, net())  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_told(program: torch.export.ExportedProgram, x: Tensor) -> None:
    for network in (program, fxfact.factorize(net(), "tucker", rank=0.4, example_inputs=x)):
        with pytest.raises(FileError, match="cannot be written there"):
            fxfact.save(network, "/dev/full")
