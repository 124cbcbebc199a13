"""Adapters that peft puts beside convolutions: merged before the factorization, and after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.conv import FactorizedModule
from fxfact.errors import WeightError
from tests.support import apart, copied_state, has_state, skip_reasons

pytestmark = pytest.mark.integration


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3)))


def adapted(seed: int = 0, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["stem", "body"], init_lora_weights=False, **options)
    return peft.get_peft_model(Classifier(), config).eval()


def factorized_at_full_rank(model: nn.Module, x: Tensor, **options: Any) -> Any:
    return fxfact.factorize(
        model, "channel_svd", rank=1000, allow_growth=True, example_inputs=x, verify=True, **options
    )


@pytest.mark.parametrize("capture", ["auto", "modules"])
def test_adapters_are_left_dense_and_their_base_is_factorized(capture: Any) -> None:
    model, x = adapted(), torch.randn(2, 3, 12, 12)
    expected = model(x)
    small = factorized_at_full_rank(model, x, capture=capture)
    assert [d.path for d in fxfact.plan_of(small).rewrites] == [
        f"base_model.model.{name}.base_layer" for name in ("stem", "body")
    ]
    reasons = skip_reasons(small)
    assert reasons.pop("base_model.model.head") == "the weight of a linear layer is a matrix: use svd"
    assert len(reasons) == 4
    for path, reason in reasons.items():
        owner = path.partition(".lora_")[0]
        assert reason.startswith(f"it belongs to the adapter 'default' of {owner}: merge the adapter first")
    assert apart(expected, small(x)) < 1e-5
    included = fxfact.plan(model, "svd", rank=2, example_inputs=x, allow_growth=True, include="*.lora_B.*")
    assert [d.path for d in included.rewrites] == [f"base_model.model.{n}.lora_B.default" for n in ("stem", "body")]


@pytest.mark.parametrize("capture", ["auto", "modules"])
def test_adapters_of_linear_layers_are_left_dense(capture: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
    model, x = peft.get_peft_model(Classifier(), config).eval(), torch.randn(2, 3, 12, 12)
    small = fxfact.factorize(model, "svd", rank=3, example_inputs=x, verify=True, capture=capture)
    assert [d.path for d in fxfact.plan_of(small).rewrites] == ["base_model.model.head.base_layer"]
    adapters = {path: reason for path, reason in skip_reasons(small).items() if ".lora_" in path}
    assert len(adapters) == 2
    assert all("the adapter 'default' of base_model.model.head" in reason for reason in adapters.values())
    if capture == "modules":
        with pytest.raises(WeightError, match=r"head\.base_layer \(FactorizedLinear\).*to_linear\(\)"):
            small.merge_adapter()


def test_merging_into_a_factorized_base_is_refused_and_right_after_to_conv() -> None:
    model, x = adapted(), torch.randn(2, 3, 12, 12)
    small = factorized_at_full_rank(model, x)
    expected, before = small(x), copied_state(small)
    for merge in (
        small.merge_adapter,
        small.merge_and_unload,
        lambda: small.merge_and_unload(safe_merge=True),
        lambda: small.merge_adapter(safe_merge=True),
    ):
        with pytest.raises(WeightError, match=r"^base_model\.model\.stem\.base_layer \(FactorizedConv2d\).*to_conv"):
            merge()
        assert has_state(small, before)
        assert small(x).equal(expected)
    for path, module in list(small.named_modules()):
        if isinstance(module, FactorizedModule):
            small.set_submodule(path, module.to_conv())
    assert apart(expected, small(x)) < 1e-5
    merged = small.merge_and_unload()
    assert type(merged) is Classifier
    assert apart(expected, merged(x)) < 1e-5


def test_an_adapter_that_was_merged_before_is_in_the_factorized_model() -> None:
    model, x = adapted(), torch.randn(2, 3, 12, 12)
    expected = model(x)
    model.merge_adapter()
    small = factorized_at_full_rank(model, x)
    assert apart(expected, small(x)) < 1e-5
    with pytest.raises(WeightError, match="nothing in it was changed"):
        small.unmerge_adapter()
    merged = adapted().merge_and_unload()
    again = factorized_at_full_rank(merged, x, capture="modules")
    assert type(again) is Classifier
    assert [d.path for d in fxfact.plan_of(again).rewrites] == ["stem", "body"]
    assert apart(expected, again(x)) < 1e-5


def test_layers_whose_adapter_reads_the_base_weight_stay_dense() -> None:
    model, x = adapted(use_dora=True), torch.randn(2, 3, 12, 12)
    plan = fxfact.plan(model, "tucker", rank=0.5, example_inputs=x)
    assert not plan.rewrites
    assert all("its weight is also read by" in d.reason for d in plan if d.path.endswith("base_layer"))


def test_several_adapters_are_left_dense_in_modules_and_exported_programs() -> None:
    model, x = adapted(), torch.randn(2, 3, 12, 12)
    model.add_adapter("other", model.peft_config["default"])
    model.eval()
    small = fxfact.factorize(model, "tucker", rank=0.6, example_inputs=x)
    program = torch.export.export(model, (x,))
    for plan in (fxfact.plan_of(small), fxfact.plan(program, "tucker", rank=0.6)):
        used = [d for d in plan if ".lora_" in d.path and ".other" not in d.path]
        assert len(used) == 4
        assert all(d.reason.startswith("it belongs to the adapter 'default' of base_model.model.") for d in used)
        assert len(plan.rewrites) == 2
