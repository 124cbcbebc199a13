"""Every factorization on real networks: exact graphs, ranks, copies, compilation, export and training.

The trained networks need weights from FXFACT_DATA (or ``../shared/data``). Without them they are skipped.
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

pytestmark = pytest.mark.integration

factorizations = pytest.mark.parametrize("factorization", ALL, ids=by_name)
networks = pytest.mark.parametrize("name", list(NETWORKS))


def load_network(name: str) -> tuple[nn.Module, Tensor]:
    network = NETWORKS[name]
    if network.weights and data_folder() is None:
        pytest.skip("trained weights are missing: set FXFACT_DATA to their folder")
    return network.load(), torch.randn(2, *network.input_shape, generator=torch.Generator().manual_seed(0))


@networks
@factorizations
def test_network_at_half_the_parameters_keeps_every_promise(name: str, factorization: Factorization) -> None:
    model, x = load_network(name)
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
    check_one_step_lowers_the_loss(result, x)


def check_rank(decision: fxfact.Decision, result: nn.Module) -> None:
    """The chain has at most half of the parameters, and more than half at the next higher rank."""
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


def check_one_step_lowers_the_loss(result: nn.Module, x: Tensor) -> None:
    """One step of gradient descent lowers the loss. The step is short, so that the first-order term dominates."""

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
def test_network_at_full_rank_equals_the_original(name: str, factorization: Factorization) -> None:
    model, x = load_network(name)
    chosen = fxfact.plan(model, factorization, rank=10**6, allow_growth=True, include=is_narrow)
    result = fxfact.apply(chosen, model)
    with torch.no_grad():
        assert relative_error(model(x), result(x)) < 1e-4
    assert all(len(decision.stages) > 1 for decision in chosen.rewrites)


def is_narrow(path: str, spec: ConvSpec) -> bool:
    """Leave out wide layers, where the full rank of CP and TT takes gigabytes and tests nothing new."""
    return max(spec.in_channels, spec.out_channels) <= 128


@factorizations
def test_inductor_compiles_every_factorization(factorization: Factorization) -> None:
    model, x = load_network("wide_resnet8")
    result = fxfact.factorize(model, [quick(factorization), "svd"], rank=0.5, example_inputs=x)
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative_error(result(x), torch.compile(result, fullgraph=True)(x)) < 1e-5
