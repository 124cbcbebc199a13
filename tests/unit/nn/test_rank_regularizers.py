"""Tensor dropout, tensor lasso and the pruning of ranks."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact.nn as fnn
from fxfact.errors import ArgumentError, ArgumentTypeError, FxfactError, RefusedError
from tests.support import apart

VARIANTS = [
    ("cp", "factorized"),
    ("cp", "mobilenet"),
    ("cp", "reconstructed"),
    ("cp_mobilenet", "factorized"),
    ("tucker", "factorized"),
    ("tucker", "reconstructed"),
    ("tt", "factorized"),
    ("tt", "reconstructed"),
    ("spatial_svd", "factorized"),
]
CONVS = {
    "plain": nn.Conv2d(8, 12, 3, padding=1),
    "groups": nn.Conv2d(8, 12, 3, stride=2, groups=2),
    "transposed": nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2),
    "order 4": fnn.ConvNd(8, 12, (3, 2, 1, 3), padding=1),
}
variants = pytest.mark.parametrize(("factorization", "implementation"), VARIANTS)
convs = pytest.mark.parametrize("name", CONVS)


def layer_of(name: str, factorization: str, implementation: str, rank: Any = 0.9) -> fnn.FactorizedConv:
    conv = copy.deepcopy(CONVS[name]).double()
    options = {"factorization": factorization, "implementation": implementation}
    return fnn.FactorizedConv.from_conv(conv, rank, decompose_weights=False, **options)


def sample(name: str) -> Tensor:
    sizes = (4, 3, 2, 4) if name == "order 4" else (7, 6)
    return torch.randn(3, 8, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# Dropout


@convs
@variants
def test_dropout_leaves_evaluation_alone_and_keeps_the_mean(factorization: str, implementation: str, name: str) -> None:
    torch.manual_seed(0)
    layer, x = layer_of(name, factorization, implementation), sample(name)
    expected = layer(x)
    fnn.tensor_dropout(layer, 0.2, min_dim=1)
    assert layer.eval()(x).equal(expected)
    layer.train()
    outputs = torch.stack([layer(x).detach() for _ in range(400)])
    assert not outputs[0].equal(outputs[1])
    deviation = outputs.std(0) / 400**0.5
    assert float(((outputs.mean(0) - expected.detach()).abs() < 5 * deviation + 1e-12).double().mean()) > 0.98
    assert apart(expected, layer.to_conv()(x)) < 1e-10
    fnn.remove_tensor_dropout(layer)
    assert layer(x).equal(expected)


@pytest.mark.parametrize("factorization", ["cp", "tucker", "tt"])
def test_dropout_is_the_same_in_every_implementation(factorization: str) -> None:
    x = sample("plain")
    staged = layer_of("plain", factorization, "factorized")
    dense = layer_of("plain", factorization, "reconstructed")
    dense.load_state_dict(staged.state_dict())
    outputs = []
    for layer in (staged, dense):
        fnn.tensor_dropout(layer, 0.5)
        torch.manual_seed(3)
        outputs.append(layer(x))
    assert apart(*outputs) < 1e-10
    assert apart(staged.eval()(x), outputs[0]) > 0.1


def test_dropout_drops_whole_rank_indices_and_keeps_at_least_some() -> None:
    layer = fnn.TuckerConv(8, 12, (3, 3), rank=(6, 5), bias=False)
    fnn.tensor_dropout(layer, 0.99, min_values=2)
    for _ in range(20):
        gains = layer._gains()
        assert [int(gain.count_nonzero()) for gain in gains.values()] >= [2, 2]
        assert {round(float(v), 3) for gain in gains.values() for v in gain} == {0.0, 100.0}
    fnn.tensor_dropout(layer, 0.5, min_dim=5)
    assert list(layer._gains()) == [1]  # the rank 5 of the input channels is left alone
    fnn.tensor_dropout(layer.eval(), 0.5, drop_test=True)
    assert {float(v) for gain in layer._gains().values() for v in gain} <= {0.0, 1.0}


def test_dropout_is_an_argument_of_layers_and_applies_to_models() -> None:
    layer = fnn.CPConv(8, 12, (3, 3), rank=9, tensor_dropout=0.5)
    assert layer.rank_dropout.p == 0.5
    model = nn.Sequential(fnn.TTConv(8, 8, (3, 3), rank=4), nn.ReLU(), fnn.CPConv(8, 8, (3, 3), rank=4))
    assert fnn.tensor_dropout(model, 0.3) is model
    assert [model[k].rank_dropout.p for k in (0, 2)] == [0.3, 0.3]
    assert fnn.remove_tensor_dropout(model)[0].rank_dropout is None


# Lasso


@convs
@variants
def test_lasso_changes_nothing_at_first_and_nothing_when_it_is_removed(
    factorization: str, implementation: str, name: str
) -> None:
    layer, x = layer_of(name, factorization, implementation), sample(name)
    expected = layer(x)
    fnn.tensor_lasso(layer)
    assert apart(expected, layer(x)) < 1e-12
    with torch.no_grad():
        for weight in layer.rank_lasso.weights.values():
            weight.uniform_(0.1, 0.9)
    scaled = layer(x)
    assert apart(expected, scaled) > 0.1
    assert apart(scaled, layer.to_conv()(x)) < 1e-10
    fnn.remove_tensor_lasso(layer)
    assert layer.rank_lasso is None
    assert apart(scaled, layer(x)) < 1e-10


def test_lasso_loss_is_the_mean_or_sum_of_the_gains_and_trains_them() -> None:
    model = nn.Sequential(fnn.TuckerConv(8, 8, (3, 3), rank=(4, 2)), fnn.CPConv(8, 8, (3, 3), rank=6))
    fnn.tensor_lasso(model, threshold=0.25)
    assert float(fnn.lasso_loss(model, 0.5)) == 0.5
    assert float(fnn.lasso_loss(model, 0.5, normalize_loss=False)) == 6.0
    gains = model[1].rank_lasso.weights["0"]
    with torch.no_grad():
        gains[0], gains[1] = 0.2, 3.0
    assert float(fnn.lasso_loss(model, 1, normalize_loss=False)) == 4 + 2 + 3 + 4 * 1
    model(torch.randn(2, 8, 5, 5)).sum().backward()
    assert gains.grad[0] == 0  # a gain that is zero stays so
    assert gains.grad[1] == 0  # clamped
    assert gains.grad[2] != 0
    fnn.lasso_loss(model).backward()
    assert gains.grad[0] == 0
    assert gains.grad[1] > 0  # the penalty brings it back


def test_lasso_is_an_argument_of_layers_and_applied_once() -> None:
    layer = fnn.CPConv(8, 12, (3, 3), rank=9, tensor_lasso=True)
    assert float(fnn.lasso_loss(layer, 1)) == 1
    with pytest.raises(ArgumentError, match="remove_tensor_lasso"):
        fnn.tensor_lasso(layer)


@pytest.mark.integration
@variants
def test_regularized_layer_can_be_compiled_copied_and_loaded(factorization: str, implementation: str) -> None:
    layer, x = layer_of("plain", factorization, implementation), sample("plain")
    fnn.tensor_lasso(fnn.tensor_dropout(layer, 0.5)).eval()
    with torch.no_grad():
        for weight in layer.rank_lasso.weights.values():
            weight.uniform_(0.1, 0.9)
    y = layer(x)
    torch.compiler.reset()
    assert apart(y, torch.compile(layer, fullgraph=True, backend="aot_eager")(x)) < 1e-10
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.fx.symbolic_trace(layer)):
        assert apart(y, other(x)) < 1e-12
    other = fnn.tensor_lasso(layer_of("plain", factorization, implementation))
    other.load_state_dict(layer.state_dict())
    assert other(x).equal(y)
    torch.compile(layer.train(), fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_traced_layer_draws_new_indices_in_every_call() -> None:
    layer = fnn.tensor_dropout(fnn.CPConv(8, 12, (3, 3), rank=20), 0.5)
    traced, x = torch.fx.symbolic_trace(layer), torch.randn(1, 8, 5, 5)
    assert not traced(x).equal(traced(x))


# Pruning


@convs
@variants
def test_pruning_drops_what_is_zero_exactly(factorization: str, implementation: str, name: str) -> None:
    layer, x = layer_of(name, factorization, implementation), sample(name)
    fnn.tensor_lasso(layer)
    with torch.no_grad():
        for weight in layer.rank_lasso.weights.values():
            weight[::2] = 0
    expected, rank, before = layer(x), layer.rank, copy.deepcopy(layer.state_dict())
    pruned = fnn.prune_ranks(layer)
    assert apart(expected, pruned(x)) < 1e-9
    assert pruned.rank_lasso is None
    assert all(new <= max(1, old // 2) for new, old in zip(pruned.rank, rank, strict=True))
    assert all(layer.state_dict()[key].equal(value) for key, value in before.items())
    assert layer.rank == rank


@pytest.mark.parametrize("factorization", ["cp", "tucker", "tt"])
def test_pruning_finds_zero_rows_and_columns_of_stages(factorization: str) -> None:
    layer, x = layer_of("plain", factorization, "factorized", rank=6), sample("plain")
    with torch.no_grad():
        layer.stages[0].weight[1] = 0
        layer.stages[-1].weight[:, 2] = 0
    pruned = fnn.prune_ranks(layer)
    assert apart(layer(x), pruned(x)) < 1e-10
    expected = {"cp": (4,), "tucker": (5, 5), "tt": (5, 6, 5)}[factorization]
    assert pruned.rank == expected


def test_pruning_keeps_one_index_and_what_is_not_zero() -> None:
    layer, x = layer_of("plain", "cp", "factorized", rank=6), sample("plain")
    same = fnn.prune_ranks(layer)
    assert same.rank == (6,)
    assert same(x).equal(layer(x))
    with torch.no_grad():
        layer.stages[0].weight.zero_()
    least = fnn.prune_ranks(layer)
    assert least.rank == (1,)
    assert apart(layer(x), least(x)) < 1e-12


def test_pruning_a_model_replaces_its_layers_in_a_copy() -> None:
    model = nn.Sequential(fnn.TuckerConv(8, 8, (3, 3), rank=(4, 3)), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
    fnn.tensor_lasso(fnn.tensor_dropout(model, 0.2))
    with torch.no_grad():
        model[0].rank_lasso.weights["0"][0] = 0
    pruned, x = fnn.prune_ranks(model), torch.randn(2, 8, 6, 6)
    assert pruned[0].rank == (4, 2)
    assert pruned[0].rank_dropout.p == 0.2
    assert model[0].rank == (4, 3)
    assert not pruned[0].training
    assert all(p.requires_grad for p in pruned.parameters())
    assert pruned[2].weight.data_ptr() != model[2].weight.data_ptr()
    assert apart(model(x), pruned(x)) < 1e-6


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fnn.CPConv(8, 8, (3, 3), rank=2, tensor_dropout=1.0), ArgumentError, "below 1, got 1.0"),
        (lambda: fnn.CPConv(8, 8, (3, 3), rank=2, tensor_dropout=-0.1), ArgumentError, "at least 0"),
        (lambda: fnn.tensor_dropout(fnn.CPConv(8, 8, (3, 3), rank=2), True), ArgumentError, "got True"),
        (lambda: fnn.tensor_dropout(fnn.CPConv(8, 8, (3, 3), rank=2), 0.5, min_values=0), ArgumentError, "min_values"),
        (lambda: fnn.tensor_dropout(nn.Conv2d(2, 2, 3), 0.5), ArgumentTypeError, "Conv2d has no factorized layer"),
        (lambda: fnn.tensor_lasso(fnn.CPConv(8, 8, (3, 3), rank=2), threshold=2), ArgumentError, "threshold"),
        (lambda: fnn.lasso_loss(fnn.CPConv(8, 8, (3, 3), rank=2)), ArgumentError, "Call tensor_lasso first"),
        (lambda: fnn.prune_ranks("model"), ArgumentTypeError, "str has no factorized layer"),
    ],
)
def test_invalid_arguments_of_regularizers_are_refused(call: Any, error: type[FxfactError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("regularize", [partial(fnn.tensor_dropout, p=0.5), fnn.tensor_lasso])
def test_joint_layers_are_refused_by_name(regularize: Any) -> None:
    """They would be left out in silence beside other layers."""
    convs = [nn.Conv2d(6, 6, 3, padding=1) for _ in range(2)]
    joint = fnn.JointConv.from_conv_list(convs, 0.5, factorization="tucker")
    other = fnn.TuckerConv(6, 6, (3, 3), rank=3)
    with pytest.raises(RefusedError, match="1 is a joint layer"):
        regularize(nn.Sequential(other, joint[0], joint[1]))
    with pytest.raises(RefusedError, match="it is a joint layer, whose convolutions share their ranks"):
        regularize(joint)
    regularize(nn.Sequential(*(fnn.TuckerConv.from_conv(joint[k].to_conv(), 0.5) for k in range(2))))
    regularize(other)
