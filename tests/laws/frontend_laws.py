"""The laws of a capture front end, as a test class to inherit from."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.capture import Captured, capture
from fxfact.conv import ConvSite
from fxfact.errors import CaptureError
from fxfact.utils import alias_copy, to_eval
from tests.support import apart, copied_state, has_state

MACS = 4 * 8 * 9 * 100 + 8 * 12 * 9 * 25 + 12 * 5  # of Layers, for a sample of 4 x 10 x 10


class Layers(nn.Module):
    """Two convolutions, defined in another order than they are called in, a norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class FrontendLaws:
    """Inherit from this class, and say which front end it is. All laws become tests of your class.

    Attributes:
        frontend: the name of the front end.
        runs_python: whether the front end runs the model's own Python code.
        keeps_modes: whether the result keeps the training mode of every module.
    """

    frontend: Any
    runs_python: bool = True
    keeps_modes: bool = True

    def make_model(self) -> nn.Module:
        """Make a model with the layers of ``Layers``, in training mode."""
        return Layers()

    def source(self, model: nn.Module, inputs: Tensor) -> Any:
        """Return what is passed to fxfact for a model."""
        return model

    def callable_of(self, result: Any) -> nn.Module:
        """Return the module to call of a factorized network."""
        return result

    def capture(self, model: nn.Module, inputs: Tensor) -> Captured:
        return capture(self.source(model, inputs), inputs, how=self.frontend)

    def factorize(self, model: nn.Module, inputs: Tensor, **options: Any) -> Any:
        settings = {"rank": 0.5, "verify": True, **options}
        source = self.source(model, inputs)
        given = {} if source is not model else {"example_inputs": inputs}
        return fxfact.factorize(source, ["tucker", "channel_svd"], capture=self.frontend, **given, **settings)

    def seeded_model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make_model()

    def test_frontend_is_recorded_in_the_result(self, image: Tensor) -> None:
        captured = self.capture(self.seeded_model().eval(), image)
        assert captured.frontend == self.frontend
        assert captured.refused == ()

    def test_frontend_leaves_the_model_and_the_inputs_unchanged(self, image: Tensor) -> None:
        model, inputs = self.seeded_model(), image.clone()
        model.norm.eval()
        source = self.source(model, image)
        before, tensors = copied_state(model), [*model.parameters(), *model.buffers()]
        attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        modes = [module.training for module in model.modules()]
        generators = torch.get_rng_state(), random.getstate()
        network = capture(source, inputs, how=self.frontend).network
        self.factorize(model, inputs)
        assert inputs.equal(image)
        assert has_state(model, before)
        assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.get_rng_state().equal(generators[0])
        assert random.getstate() == generators[1]
        assert not {id(tensor) for tensor in network.parameters()} & {id(tensor) for tensor in tensors}

    def test_captured_network_computes_what_the_model_computes(self, image: Tensor) -> None:
        model = self.seeded_model().eval()
        network = to_eval(alias_copy(self.capture(model, image).network))
        for inputs in (image, 3 * image.flip(0)):
            assert apart(model(inputs), network(inputs)) < 1e-6

    def test_sites_are_in_the_order_of_the_calls(self, image: Tensor) -> None:
        captured = self.capture(self.seeded_model().eval(), image)
        assert [site.path for site in captured.sites] == ["first", "second", "head"]
        assert captured.found == captured.sites
        assert [site.input_shapes for site in captured.sites] == [
            ((3, 4, 10, 10),),
            ((3, 8, 10, 10),),
            ((3, 12),),
        ]

    def test_macs_are_counted_for_one_sample(self, image: Tensor) -> None:
        for inputs in (image, image[:1]):
            captured = self.capture(self.seeded_model().eval(), inputs)
            assert (captured.samples, captured.macs) == (len(inputs), MACS)

    def test_macs_are_counted_without_a_batch_axis(self, image: Tensor) -> None:
        conv = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)).eval()
        captured = self.capture(conv, image[0])
        assert (captured.samples, captured.macs) == (1, 4 * 8 * 9 * 100)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_result_keeps_dtype_and_memory_format(self, image: Tensor, dtype: torch.dtype) -> None:
        model = self.seeded_model().eval().to(dtype, memory_format=torch.channels_last)
        result = self.callable_of(self.factorize(model, image.to(dtype), allow_growth=True))
        assert {parameter.dtype for parameter in result.parameters()} == {dtype}
        kernels = [parameter for parameter in result.parameters() if parameter.ndim == 4]
        assert len(kernels) == 6
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
        assert result(image.to(dtype)).dtype == dtype

    def test_captured_network_stays_on_its_device(self, image: Tensor) -> None:
        captured = self.capture(self.seeded_model().eval().to("meta"), image.to("meta"))
        assert {parameter.device.type for parameter in captured.network.parameters()} == {"meta"}
        assert len(captured.sites) == 3

    def test_result_keeps_training_modes_and_requires_grad(self, image: Tensor) -> None:
        model = self.seeded_model().train()
        model.norm.eval()
        model.second.weight.requires_grad_(False)
        result = self.callable_of(self.factorize(model, image, allow_growth=True))
        trainable = {name.partition(".")[0]: p.requires_grad for name, p in result.named_parameters()}
        assert trainable == {"first": True, "norm": True, "second": False, "head": True}
        if self.keeps_modes:
            modes = {name: module.training for name, module in result.named_modules()}
            assert modes.pop("norm") is False
            assert all(modes.values())

    def test_copies_of_the_result_compute_the_same(self, image: Tensor) -> None:
        result = self.factorize(self.seeded_model().eval(), image)
        expected = self.callable_of(result)(image)
        copied = copy.deepcopy(result)
        assert self.callable_of(copied)(image).equal(expected)
        assert fxfact.plan_of(copied) == fxfact.plan_of(result)

    def test_forward_that_writes_to_a_parameter_is_refused(self, image: Tensor) -> None:
        if not self.runs_python:
            pytest.skip("the front end does not run the model's Python code")
        model = self.seeded_model().eval()
        kind = type(model)

        def forward(self: Any, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.second.weight.mul_(0.5)
            return kind.forward(self, x)

        model.__class__ = type("Writing", (kind,), {"forward": forward})
        before = copied_state(model)
        with pytest.raises(CaptureError, match=r"second\.weight: forward changes this parameter"):
            self.capture(model, image)
        assert has_state(model, before)

    def test_sites_have_the_tensors_of_the_network(self, image: Tensor) -> None:
        captured = self.capture(self.seeded_model().eval(), image)
        parameters = {id(parameter) for parameter in captured.network.parameters()}
        assert all(isinstance(site, ConvSite) and id(site.weight) in parameters for site in captured.found)
