"""Copies of models, and the metadata that they keep."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, fx, nn

from fxfact.errors import CaptureError
from fxfact.utils import alias_copy, copy_structure, copy_with_shared, get_metadata, set_metadata, to_eval
from tests.support import Small


def addresses(module: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in module.parameters()]


def test_an_alias_copy_shares_memory_but_not_parameter_objects(small: Small, image: Tensor) -> None:
    small.first.weight.requires_grad_(False)
    small.first.weight.note = "kept"
    twin = alias_copy(small)
    assert addresses(twin) == addresses(small)
    assert not {id(parameter) for parameter in twin.parameters()} & {id(parameter) for parameter in small.parameters()}
    assert not twin.first.weight.requires_grad
    assert twin.first.weight.note == "kept"
    assert twin.norm.running_mean.data_ptr() != small.norm.running_mean.data_ptr(), "buffers are copied"
    twin(image).sum().backward()
    assert all(parameter.grad is None for parameter in small.parameters())
    twin.second.weight = nn.Parameter(torch.zeros_like(small.second.weight))
    assert small.second.weight.any()


def test_parameters_of_a_subclass_stay_of_that_class() -> None:
    class Labelled(nn.Parameter):
        def __new__(cls, values: Tensor, label: str) -> Labelled:
            parameter = nn.Parameter.__new__(cls, values)
            parameter.label = label
            return parameter

    model = nn.Linear(3, 2)
    model.weight = Labelled(torch.randn(2, 3), "w")
    twin = alias_copy(model)
    assert type(twin.weight) is Labelled
    assert twin.weight.label == "w"


def test_a_copy_shares_only_the_tensors_asked_for(small: Small) -> None:
    twin = copy_with_shared(small, {id(small.first.weight), id(small.norm.running_mean)})
    assert twin.first.weight is small.first.weight
    assert twin.norm.running_mean is small.norm.running_mean
    assert twin.second.weight is not small.second.weight
    assert all(one is other for one, other in zip(copy_structure(small).parameters(), small.parameters(), strict=True))


def test_tensors_that_are_not_leaves_are_copied_detached() -> None:
    pruned = nn.utils.prune.l1_unstructured(nn.Conv2d(2, 3, 3), "weight", 0.5)
    twin = alias_copy(pruned)
    assert not twin.weight.requires_grad
    assert twin.weight.equal(pruned.weight)
    assert pruned.weight.grad_fn is not None


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    class Uncopyable(nn.Module):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("not me")

    with pytest.raises(CaptureError, match="Uncopyable cannot be copied: not me"):
        alias_copy(Uncopyable())


@pytest.mark.parametrize("traced", [False, True])
def test_metadata_is_kept_by_copies_and_pickles(traced: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    network = fx.symbolic_trace(model) if traced else model
    assert get_metadata(network) is None
    set_metadata(network, None)
    assert get_metadata(network) is None
    set_metadata(network, {"plan": 1})
    pickled = pickle.loads(pickle.dumps(network))
    for twin in (alias_copy(network), copy.deepcopy(network), pickled, alias_copy(pickled)):
        assert get_metadata(twin) == {"plan": 1}


def test_a_submodule_named_meta_is_no_metadata() -> None:
    model = nn.Sequential()
    model.meta = nn.Linear(2, 2)
    network = fx.GraphModule(model, fx.symbolic_trace(nn.Identity()).graph)
    network.meta = nn.Linear(2, 2)
    set_metadata(network, "plan")
    assert get_metadata(network) == "plan"


def test_evaluation_mode_is_set_where_it_can_be() -> None:
    module = nn.Dropout().train()
    assert to_eval(module) is module
    assert not module.training
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),)).module()
    assert to_eval(program) is program
