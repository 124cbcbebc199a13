"""Real networks × factorizations: everything that a factorized network owes its user, at once.

The trained networks need weights from FXFACT_DATA (or ``../shared/data``); where those are absent they are skipped.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxfact
from benchmarks.networks import NETWORKS, data_folder
from fxfact.conv import ConvSpec
from fxfact.factorizations import Factorization
from fxfact.utils import relative_error
from tests.support import ALL, EVERY_STAGE, by_name, params_of, quick, with_composed_kernels

LARGE = ("resnet18", "resnet50", "resnet56", "squeezenet")
factorizations = pytest.mark.parametrize("factorization", ALL, ids=by_name)
networks = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in NETWORKS]
)


def load(name: str) -> tuple[nn.Module, Tensor]:
    network = NETWORKS[name]
    if network.weights and data_folder() is None:
        pytest.skip("trained weights are not here: set FXFACT_DATA to their folder")
    return network.load(), torch.randn(2, *network.input_shape, generator=torch.Generator().manual_seed(0))


@networks
@factorizations
def test_everything_at_half_the_parameters(name: str, factorization: Factorization) -> None:
    model, x = load(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = fxfact.factorize(model, quick(factorization), rank=0.5, example_inputs=x, verify=True)
    plan = fxfact.plan_of(result)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    for decision in plan:
        assert (decision.factorization is None) == bool(decision.reason)
    for decision in plan.rewrites:
        check_rank(decision, result)
    with torch.no_grad():
        expected, found = model(x), result(x)
        assert [y.shape for y in tree_leaves(expected)] == [y.shape for y in tree_leaves(found)]
        assert relative_error(with_composed_kernels(model, result).eval()(x), found) < 1e-5
    again = fxfact.apply(plan, model, weights="empty")
    again.load_state_dict(result.state_dict())
    with torch.no_grad():
        assert relative_error(found, again.eval()(x)) == 0
    check_compiled_and_exported(result, x, found)
    check_a_step_lowers_the_loss(result, x)


def check_rank(decision: fxfact.Decision, result: nn.Module) -> None:
    """At most half of the parameters, and over half at the next higher rank."""
    method, spec = decision.factorization, decision.spec
    assert method is not None
    assert spec is not None
    assert params_of([result.get_submodule(decision.path)]) <= 0.5 * spec.params
    ranks = method.ranks(spec)
    higher = ranks[ranks.index(decision.rank) + 1]
    assert sum(stage.params for stage in method.layout(spec, higher)) > 0.5 * spec.params


def check_compiled_and_exported(result: nn.Module, x: Tensor, found: object) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(result, fullgraph=True, backend="aot_eager")
        assert relative_error(found, compiled(x)) < 1e-5
        assert relative_error(found, torch.export.export(result, (x,)).module()(x)) < 1e-5


def check_a_step_lowers_the_loss(result: nn.Module, x: Tensor) -> None:
    """One step of gradient descent, short enough for its first-order promise to hold."""

    def loss() -> Tensor:
        return sum((y.square().mean() for y in tree_leaves(tuned(x))), torch.zeros(()))

    tuned = copy.deepcopy(result)
    first = loss()
    first.backward()
    assert all(p.grad is not None for p in tuned.parameters())
    slope = sum(float(p.grad.square().sum()) for p in tuned.parameters() if p.grad is not None)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.01 * float(first.detach()) / slope)
    optimizer.step()
    assert float(loss().detach()) < float(first.detach())


@networks
@pytest.mark.parametrize("factorization", EVERY_STAGE, ids=by_name)
def test_at_full_rank_the_network_is_the_original(name: str, factorization: Factorization) -> None:
    model, x = load(name)
    chosen = fxfact.plan(model, factorization, rank=10**6, allow_growth=True, include=small_enough)
    result = fxfact.apply(chosen, model)
    with torch.no_grad():
        assert relative_error(model(x), result(x)) < 1e-4
    assert all(len(decision.stages) > 1 for decision in chosen.rewrites)


def small_enough(path: str, spec: ConvSpec) -> bool:
    """Full rank of CP and TT is many times the channels: on wide layers that is gigabytes, and proves nothing new."""
    return max(spec.in_channels, spec.out_channels) <= 128


@pytest.mark.slow
@factorizations
def test_inductor_compiles_every_factorization(factorization: Factorization) -> None:
    model, x = load("wide_resnet8")
    result = fxfact.factorize(model, [quick(factorization), "pointwise_svd"], rank=0.5, example_inputs=x)
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative_error(result(x), torch.compile(result, fullgraph=True)(x)) < 1e-5
