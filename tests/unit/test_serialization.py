from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import fxfact
from fxfact.errors import ArgumentTypeError, FileError, FxfactError, PlanError
from fxfact.factorizations import Tucker
from tests.support import FakeTimer, rewrite_archive


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
def test_load_puts_the_network_into_another_instance(
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


def test_load_repeats_a_second_factorization_and_folded_weights(x: Tensor, tmp_path: Path) -> None:
    once = fxfact.factorize(net(normed=True), "channel_svd", rank=0.6, example_inputs=x, fold_weights=True)
    twice = fxfact.factorize(once, "svd", rank=0.7, include="*", allow_growth=True)
    assert fxfact.plan_of(twice).rewrites
    for network in (once, twice):
        fxfact.save(network, tmp_path / "small.pt")
        again = fxfact.load(tmp_path / "small.pt", net(1, normed=True))
        assert torch.equal(again(x), network(x))


class Custom(Tucker):
    """A factorization that fxfact does not know."""

    name = "own"


def test_load_takes_factorizations_of_the_user(x: Tensor, tmp_path: Path) -> None:
    small = fxfact.factorize(net(), Custom(), rank=0.5)
    fxfact.save(small, tmp_path / "small.pt")
    fxfact.plan_of(small).save(tmp_path / "plan.json")
    with pytest.raises(FxfactError, match="factorizations="):
        fxfact.load(tmp_path / "small.pt", net(1))
    with pytest.raises(PlanError, match="factorizations="):
        fxfact.Plan.load(tmp_path / "plan.json")
    assert fxfact.load(tmp_path / "small.pt", net(1), factorizations=[Custom])(x).equal(small(x))
    assert fxfact.Plan.load(tmp_path / "plan.json", factorizations=[Custom]) == fxfact.plan_of(small)


def test_load_keeps_distilled_weights(x: Tensor, tmp_path: Path) -> None:
    model = net()
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=x)
    tuned, _ = fxfact.distill(small, model, torch.randn(16, 3, 9, 9).split(4), steps=20, lr=1e-2)
    fxfact.save(tuned, tmp_path / "small.pt")
    assert torch.equal(fxfact.load(tmp_path / "small.pt", net(1))(x), tuned(x))


def test_program_is_read_here_and_by_pytorch(program: torch.export.ExportedProgram, x: Tensor, tmp_path: Path) -> None:
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


def test_load_names_the_first_differences_of_another_model(x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    fxfact.save(fxfact.factorize(net(), "tucker", rank=0.4, example_inputs=x, exclude="first"), path)
    with pytest.raises(PlanError, match=r"first: the plan has .*, the model .*"):
        fxfact.load(path, net(width=10))
    wider = net()
    wider.head = nn.Linear(16, 5)
    with pytest.raises(
        PlanError, match=r"head: the plan has Linear\(16→4\) with bias, the model Linear\(16→5\) with bias"
    ):
        fxfact.load(path, wider)
    normed = net()
    normed.norm = nn.GroupNorm(1, 12)
    with pytest.raises(FileError, match=r"norm.running_mean: the file has float32 \(12,\), the model nothing"):
        fxfact.load(path, normed)
    with pytest.raises(FileError, match=r"float32 .*, the model float64"):
        fxfact.load(path, net().double())
    with pytest.raises(FileError, match="Pass the model"):
        fxfact.load(path)
    with pytest.raises(ArgumentTypeError):
        fxfact.load(path, "resnet")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError):
        fxfact.save("resnet", path)  # type: ignore[arg-type]


def test_program_with_keywords_dictionaries_and_branches_is_read(tmp_path: Path) -> None:
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


def test_load_of_a_dense_network_does_not_change_the_model(tmp_path: Path) -> None:
    one, other = net(0), net(1)
    before = other.first.weight.clone()
    fxfact.save(one, tmp_path / "dense.pt")
    again = fxfact.load(tmp_path / "dense.pt", other)
    assert again is not other
    assert other.first.weight.equal(before)
    assert again.first.weight.equal(one.first.weight)


def test_files_are_written_through_links_and_pipes(x: Tensor, tmp_path: Path) -> None:
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


def test_load_into_a_meta_model_keeps_shared_parameters(x: Tensor, tmp_path: Path) -> None:
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


def test_save_that_fails_leaves_no_file(x: Tensor, tmp_path: Path) -> None:
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


def test_load_takes_a_model_on_the_meta_device(x: Tensor, tmp_path: Path) -> None:
    small = fxfact.factorize(net(), "tucker", rank=0.4, example_inputs=x)
    fxfact.save(small, tmp_path / "small.pt")
    with torch.device("meta"):
        empty = Net().eval()
    again = fxfact.load(tmp_path / "small.pt", empty)
    torch.testing.assert_close(again(x), small(x))
    assert all(parameter.requires_grad for parameter in again.parameters())
    with pytest.raises(FileError, match=r"\.pt2 is for exported programs"):
        fxfact.save(small, tmp_path / "small.pt2")


class _Named:
    """An output of a class that is registered as a pytree node."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_load_says_which_package_a_program_needs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Wrapped(Net):
        def forward(self, x: Tensor) -> Any:
            return _Named(super().forward(x))

    _pytree.register_pytree_node(
        _Named,
        lambda output: ([output.logits], None),
        lambda values, _: _Named(*values),
        serialized_type_name="window.shop.Out",
    )
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(Wrapped().eval(), (torch.randn(1, 3, 8, 8),)), path)
    assert fxfact.load(path) is not None
    rewrite_archive(path, lambda name, data: data.replace(b"window.shop.Out", b"shop.window.Out"))
    capfd.readouterr()
    with pytest.raises(FileError, match=r"shop\.window\.Out.*--import shop\.window"):
        fxfact.load(path)
    assert "Traceback" not in capfd.readouterr().err


def test_load_repeats_inference_passes_and_a_second_factorization(x: Tensor, tmp_path: Path) -> None:
    swapped = fxfact.factorize(net(), "tucker", rank=0.5, example_inputs=x, capture="modules")
    again = fxfact.factorize(swapped, "channel_svd", rank=0.5, example_inputs=x, allow_growth=True)
    for network in (again, *(fxfact.for_inference(each, x, timer=FakeTimer()) for each in (swapped, again))):
        fxfact.save(network, tmp_path / "small.pt")
        loaded = fxfact.load(tmp_path / "small.pt", net(1))
        assert torch.equal(loaded(x), network(x))
        assert fxfact.plan_of(loaded) == fxfact.plan_of(network)


def test_save_and_load_refuse_what_is_no_path(x: Tensor) -> None:
    with pytest.raises(ArgumentTypeError, match=r"path must be a str or os\.PathLike, got int"):
        fxfact.save(fxfact.factorize(net(), rank=0.5), 3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"path must be a str or os\.PathLike, got int"):
        fxfact.load(3, net())  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_save_reports_a_full_disk(program: torch.export.ExportedProgram, x: Tensor) -> None:
    for network in (program, fxfact.factorize(net(), "tucker", rank=0.4, example_inputs=x)):
        with pytest.raises(FileError, match="cannot be written there"):
            fxfact.save(network, "/dev/full")
