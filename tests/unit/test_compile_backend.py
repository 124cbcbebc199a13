from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
from fxfact import compile_backend
from fxfact.errors import ArgumentTypeError, RankError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.middle = nn.Conv2d(12, 16, 3, padding="same", groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.middle(self.features(x)))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


def made(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().eval()


@pytest.fixture
def model() -> Net:
    return made()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the weights that are decomposed from now on."""
    seen: list[str] = []
    own = compile_backend._decompose

    def counted(weight: Tensor, decision: Any) -> Any:
        seen.append(decision.path)
        return own(weight, decision)

    monkeypatch.setattr(compile_backend, "_decompose", counted)
    return seen


def factorized(model: nn.Module, x: Tensor) -> nn.Module:
    return fxfact.factorize(model, "tucker", rank=0.5, example_inputs=x)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_backend_computes_what_factorize_gives(model: Net, x: Tensor) -> None:
    backend = fxfact.backend("tucker", rank=0.5, inner="eager")
    compiled = torch.compile(model, backend=backend)
    small = factorized(model, x)
    assert close(compiled(x), small(x))
    assert not close(compiled(x), model(x))
    (plan,) = backend.plans
    assert [(d.path, d.rank) for d in plan.rewrites] == [(d.path, d.rank) for d in fxfact.plan_of(small).rewrites]
    assert [d.path for d in plan.rewrites] == ["features.0", "middle", "up"]


@torch.no_grad()
def test_backend_hands_the_graph_to_another_backend(model: Net, x: Tensor) -> None:
    compiled = torch.compile(model, backend=fxfact.backend("tucker", rank=0.5, inner="aot_eager"))
    assert close(compiled(x), factorized(model, x)(x))


@torch.no_grad()
def test_factors_follow_their_parameters_without_compiling_again(model: Net, x: Tensor, decomposed: list[str]) -> None:
    backend = fxfact.backend("tucker", rank=0.5, inner="eager")
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    assert sorted(decomposed) == ["features.0", "middle", "up"]
    compiled(x)
    assert len(decomposed) == 3
    model.middle.weight.mul_(torch.linspace(0.5, 2, 16)[:, None, None, None])
    assert close(compiled(x), factorized(model, x)(x))
    assert decomposed[3:] == ["middle"]
    model.load_state_dict(made(1).state_dict())
    assert close(compiled(x), factorized(model, x)(x))
    assert len(decomposed) == 7
    model.up.weight = nn.Parameter(torch.randn_like(model.up.weight))
    assert close(compiled(x), factorized(model, x)(x))
    model.middle.weight.data = torch.randn_like(model.middle.weight)
    assert close(compiled(x), factorized(model, x)(x))
    assert len(decomposed) == 9
    assert len(backend.plans) == 1


@torch.no_grad()
def test_factors_follow_a_change_of_dtype_and_back(model: Net, x: Tensor) -> None:
    compiled = torch.compile(model, backend=fxfact.backend("tucker", rank=0.5, inner="eager"))
    compiled(x)
    model.double()
    found = compiled(x.double())
    assert found.dtype == torch.float64
    assert torch.allclose(found, factorized(model, x.double())(x.double()))
    model.float()
    assert close(compiled(x), factorized(model, x)(x))


def test_trained_weights_stay_dense_and_get_their_gradients(
    model: Net, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    backend = fxfact.backend("tucker", rank=0.5, inner="eager")
    compiled = torch.compile(model, backend=backend)
    with caplog.at_level(logging.WARNING, logger="fxfact"):
        compiled(x).sum().backward()
    assert "4 convolutions stay dense: gradients are on" in caplog.text
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    other = copy.deepcopy(model)
    other.zero_grad()
    other(x).sum().backward()
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all(torch.allclose(found[name], p.grad, atol=1e-5) for name, p in other.named_parameters())
    assert not backend.plans[0].rewrites
    with torch.no_grad():
        assert close(compiled(x), factorized(model, x)(x))
    assert len(backend.plans[1].rewrites) == 3


def test_frozen_weights_are_factorized_and_inputs_get_their_gradients(model: Net, x: Tensor) -> None:
    model.requires_grad_(False)
    compiled = torch.compile(model, backend=fxfact.backend("tucker", rank=0.5, inner="eager"))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    compiled(inputs[0]).sum().backward()
    factorized(model, x)(inputs[1]).sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_new_shapes_reuse_the_factors(model: Net, x: Tensor, decomposed: list[str], dynamic: bool | None) -> None:
    compiled = torch.compile(model, backend=fxfact.backend("tucker", rank=0.5, inner="eager"), dynamic=dynamic)
    small = factorized(model, x)
    for size in (10, 12, 15):
        y = torch.randn(3, 3, size, size)
        assert close(compiled(y), small(y))
    assert len(decomposed) == 3


@torch.no_grad()
def test_backend_factorizes_every_part_of_a_broken_graph(x: Tensor) -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.features(x)
            torch._dynamo.graph_break()
            return self.head(F.relu(self.up(F.relu(self.middle(x)))).mean((2, 3)))

    model = Broken().eval()
    backend = fxfact.backend("tucker", rank=0.5, inner="eager")
    found = torch.compile(model, backend=backend)(x)
    assert [[d.path for d in plan.rewrites] for plan in backend.plans] == [["features.0"], ["middle", "up"]]
    plain = Net().eval()
    plain.load_state_dict(model.state_dict())
    assert close(found, factorized(plain, x)(x))


@torch.no_grad()
def test_backend_handles_shared_computed_and_bare_weights(x: Tensor) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
            self.two.weight = self.one.weight
            self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
            self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.normed(self.two(self.one(x))), self.kernel)

    model = Odd().eval()
    backend = fxfact.backend("channel_svd", rank=0.9, inner="eager", allow_growth=True)
    found = torch.compile(model, backend=backend)(x)
    (plan,) = backend.plans
    assert any("computed in the graph" in d.reason for d in plan)
    assert {d.path for d in plan.rewrites} == {"one", "kernel"}  # Dynamo sees one weight, called twice
    expected = fxfact.factorize(model, "channel_svd", rank=0.9, allow_growth=True, example_inputs=x)
    assert close(found, expected(x))


@torch.no_grad()
def test_buffers_are_factorized_and_inputs_are_not(x: Tensor) -> None:
    class Bare(nn.Module):
        kernel: Tensor
        bias: Tensor

        def __init__(self, *, writes: bool) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.randn(8, 3, 3, 3))
            self.register_buffer("bias", torch.randn(8))
            self.writes = writes

        def forward(self, x: Tensor, given: Tensor) -> Tensor:
            if self.writes:
                self.kernel.mul_(1.5)
            return F.conv2d(F.conv2d(x, self.kernel, self.bias), given)

    given = torch.randn(4, 8, 3, 3)
    for writes in (False, True):
        model = Bare(writes=writes).eval()
        backend = fxfact.backend("channel_svd", rank=1.0, inner="eager", allow_growth=True)
        compiled = torch.compile(model, backend=backend)
        compiled(x, given)
        (plan,) = backend.plans
        reasons = {d.path: d.reason for d in plan if d.reason}
        assert "its weight is the graph's input l_given_" in reasons.values()
        assert ("also read by mul_" in reasons.get("kernel", "")) == writes
        assert [d.path for d in plan.rewrites] == ([] if writes else ["kernel"])
        model.kernel.mul_(-2.0)
        model.bias.add_(1.0)
        own = Bare(writes=False).eval()
        own.load_state_dict(model.state_dict())
        if writes:
            own.kernel.mul_(1.5)
            assert close(compiled(x, given), own(x, given))
        else:
            what = {"example_inputs": (x, given), "allow_growth": True}
            assert close(compiled(x, given), fxfact.factorize(own, "channel_svd", rank=1.0, **what)(x, given))
        assert len(backend.plans) == 1


def test_backend_works_in_inference_mode(model: Net, x: Tensor) -> None:
    compiled = torch.compile(model, backend=fxfact.backend("tucker", rank=0.5, inner="eager"))
    with torch.inference_mode():
        assert close(compiled(x), factorized(model, x)(x))
    with torch.inference_mode():
        born = Net().eval()
        backend = fxfact.backend("tucker", rank=0.5, inner="eager")
        assert close(torch.compile(born, backend=backend)(x), born(x))
    assert "inference mode" in next(iter(backend.plans[0])).reason


@torch.no_grad()
def test_backend_selects_by_path(model: Net, x: Tensor) -> None:
    how: Any = {"rank": {"up": 3, "*": 0.5}, "exclude": "features*"}
    backend = fxfact.backend({"middle": "cp", "*": "tucker"}, **how, inner="eager")
    torch.compile(model, backend=backend)(x)
    assert [(d.path, d.factorization.name) for d in backend.plans[0].rewrites] == [
        ("middle", "cp_mobilenet"),
        ("up", "tucker"),
    ]


def test_backend_refuses_wrong_options(model: Net, x: Tensor) -> None:
    with pytest.raises(RankError):
        fxfact.backend("tucker", rank=-1)
    with pytest.raises(ArgumentTypeError, match="inner"):
        fxfact.backend("tucker", inner=3)  # type: ignore[arg-type]
    compiled = torch.compile(model, backend="fxfact", options={"rank": -1, "inner": "eager"})
    with torch.no_grad(), pytest.raises(Exception, match="rank"):
        compiled(x)


_ONLY_TORCH = """
import sys, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
x = torch.randn(1, 8, 12, 12)
assert "fxfact" not in sys.modules and "fxfact" in torch.compiler.list_backends()
compiled = torch.compile(model, backend="fxfact", options={"factorization": "tucker", "rank": 0.5, "inner": "eager"})
with torch.no_grad():
    found = compiled(x)
import fxfact
expected = fxfact.factorize(model, "tucker", rank=0.5, example_inputs=x)(x)
print(float((found - expected).norm() / expected.norm()) < 1e-5, float((found - model(x)).norm()) > 0)
"""


def test_backend_name_is_known_without_importing_fxfact() -> None:
    done = subprocess.run([sys.executable, "-c", _ONLY_TORCH], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize("dynamic", [True, False, None])
@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_factors_need_no_guards_of_sizes(method: str, dynamic: bool | None) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)).eval()
    x = torch.randn(2, 8, 12, 12)
    made = fxfact.factorize(model, method, rank=0.5)
    compiled = torch.compile(model, backend=fxfact.backend(method, rank=0.5, inner="aot_eager"), dynamic=dynamic)
    with torch.no_grad():
        for batch in (x, x[:1], torch.randn(3, 8, 9, 10)):
            torch.testing.assert_close(compiled(batch), made(batch), rtol=1e-4, atol=1e-5)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        torch._dynamo.graph_break()
        return self.b(y)


@pytest.mark.parametrize(
    ("what", "rewritten"),
    [
        ({"exclude": "a"}, ["b"]),
        ({"include": "a"}, ["a"]),
        ({"rank": {"a": 0.5}}, ["a"]),
        ({"factorization": {"b": "cp"}}, ["b"]),
    ],
    ids=str,
)
def test_paths_are_those_of_the_model_in_every_part_of_a_broken_graph(
    what: dict[str, Any], rewritten: list[str]
) -> None:
    backend = fxfact.backend(inner="eager", **what)
    with torch.no_grad():
        torch.compile(Broken().eval(), backend=backend)(torch.randn(1, 8, 9, 9))
    assert [decision.path for plan in backend.plans for decision in plan.rewrites] == rewritten


def test_weight_that_cannot_be_decomposed_is_named() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    model[1].weight.data[0, 0, 0, 0] = float("nan")
    compiled = torch.compile(model, backend=fxfact.backend(inner="eager"))
    with torch.no_grad(), pytest.raises(Exception, match="WeightError: 1: the weight holds 1 NaN"):
        compiled(torch.randn(1, 8, 9, 9))


class Linears(nn.Module):
    """Linear layers as modules, as a function and as a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 5, bias=False)
        self.kernel = nn.Parameter(torch.randn(16, 16) / 4)
        self.shift = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(x @ self.kernel + self.shift)
        return self.head(torch.relu(F.linear(x, self.kernel.T)))


def test_linear_layers_are_factorized_in_every_spelling() -> None:
    model, x = Linears().eval(), torch.randn(4, 3, 6)
    backend = fxfact.backend("svd", rank=3, allow_growth=True, inner="eager")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        found = compiled(x)
        expected = fxfact.factorize(model, "svd", rank=3, allow_growth=True, example_inputs=x)(x)
        torch.testing.assert_close(found, expected)
        assert {decision.path for decision in backend.plans[0].rewrites} == {"first", "kernel", "head"}
        model.head.weight.mul_(2)
        torch.testing.assert_close(compiled(x), 2 * expected)
    left = fxfact.backend("svd", rank=3, kinds="conv", inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=left)(x), model(x))
    assert not left.plans[0].rewrites
