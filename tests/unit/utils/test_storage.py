"""Names of tensors, found by the memory that they use."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fxfact.utils import StorageIndex, storages_of


def test_aliases_and_views_are_found_and_copies_are_not() -> None:
    x = torch.randn(4, 6)
    index = StorageIndex([("x", x)])
    index.add("later", x)
    for same in (x, x.detach(), nn.Parameter(x), x[1:, ::2], x.T):
        assert index.name_of(same) == "x"
    assert index.name_of(x.clone()) is None
    assert index.name_of(copy.deepcopy(x)) is None


def test_parts_of_one_storage_are_told_apart() -> None:
    model = nn.Linear(3, 2)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    index = StorageIndex(model.named_parameters())
    assert storages_of(model.weight) == storages_of(model.bias)
    assert [index.name_of(parameter.detach()) for parameter in model.parameters()] == ["weight", "bias"]
    assert index.name_of(model.weight[:, :0]) is None, "an empty tensor uses no memory"


def test_tensors_without_storage_have_no_name() -> None:
    sparse = torch.eye(3).to_sparse()
    assert storages_of(sparse) == ()
    index = StorageIndex([("sparse", sparse)])
    assert index.name_of(sparse) is None
