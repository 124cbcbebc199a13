"""The attributes of a traced network: those that forward has read cannot be set, the others are kept."""

from __future__ import annotations

import copy
import enum
import io
import pickle
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import fxfact
from fxfact.errors import CaptureError
from tests.support import Small


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


class Head(nn.Module):
    """An inner module with settings of its own."""

    stride = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.export, self.classes = nn.Conv2d(12, 5, 1), False, 5

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.export else x * self.stride


class Segmenter(nn.Module):
    """Reads its settings in every way."""

    with_context = True
    palette: ClassVar[dict[int, str]] = {0: "background", 1: "cat"}

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(4, 12, 3, padding=1), Head()
        self.deep_supervision, self.options, self.scales = True, {"aux": {"weight": 2.0}, "size": [1, 2]}, [1, 2]
        self._aux, self.mode, self.config = False, Mode.FAST, Config()
        self.names, self.anchors, self.threshold = {0: "cat"}, torch.tensor([8.0, 16.0]), 0.5

    @property
    def _factor(self) -> float:
        return 2.0 if self._aux else 1.0

    @cached_property
    def _offset(self) -> float:
        return 0.5

    def forward(self, x: Tensor) -> Any:
        x = self.body(x) * self._factor + self._offset
        if self.with_context:
            x = x + x.mean()
        x = x * self.options["aux"]["weight"] * self.scales[0] * (1 if self.mode is Mode.FAST else 2)
        if getattr(self, "deploy", False) or hasattr(self, "fused") or self.config.fused:
            x = -x
        if self.training and self.warmup:
            x = x * 1
        x = self.head(x)
        return [x, x[:, :, ::2]] if self.deep_supervision else x

    warmup = False


class Config:
    fused = False


@pytest.fixture
def traced(image: Tensor) -> fx.GraphModule:
    result = fxfact.factorize(Segmenter().eval(), rank=0.5, example_inputs=image, capture="trace", verify=True)
    assert isinstance(result, fx.GraphModule)
    return result


def unpickled(network: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(network))


def stored(network: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "result": lambda network: network,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "copy of a pickle": lambda network: copy.deepcopy(unpickled(network)),
    "pickle of a copy": lambda network: unpickled(copy.deepcopy(network)),
    "torch.save": stored,
    "factorized again": lambda network: fxfact.factorize(network, "channel_svd", rank=0.9),
}


def is_refused(change: Callable[[], Any], name: str) -> bool:
    with pytest.raises(CaptureError, match=rf"{name}.* read this .*capture='modules'"):
        change()
    return True


@pytest.mark.parametrize("way", COPIES)
def test_attribute_that_forward_has_read_cannot_be_set(traced: fx.GraphModule, image: Tensor, way: str) -> None:
    network: Any = COPIES[way](traced)
    read = ["deep_supervision", "with_context", "options", "scales", "mode", "_aux", "_factor", "_offset", "config"]
    for name in (*read, "deploy", "fused", "warmup"):
        assert is_refused(lambda name=name: setattr(network, name, 3), f"^{name}")
    for name in ("export", "stride"):
        assert is_refused(lambda name=name: setattr(network.head, name, 3), f"^{name}")
    assert is_refused(lambda: delattr(network, "deep_supervision"), "deep_supervision")
    assert is_refused(lambda: network.options.update(aux=None), "")
    assert is_refused(lambda: network.options["aux"].__setitem__("weight", 3.0), "")
    assert is_refused(lambda: network.scales.append(3), "")
    assert len(network(image)) == 2


@pytest.mark.parametrize("way", COPIES)
def test_attributes_of_the_model_are_kept(traced: fx.GraphModule, way: str) -> None:
    network: Any = COPIES[way](traced)
    assert (network.deep_supervision, network.with_context, network.mode) == (True, True, Mode.FAST)
    assert (network.options, network.scales) == ({"aux": {"weight": 2.0}, "size": [1, 2]}, [1, 2])
    assert (network.names, network.palette, network.threshold) == ({0: "cat"}, Segmenter.palette, 0.5)
    assert network.anchors.equal(torch.tensor([8.0, 16.0]))
    assert (network.head.stride, network.head.classes) == (4, 5)
    network.names[1], network.threshold, network.head.classes, network.new = "dog", 0.7, 6, 1  # not read by forward
    assert (network.names, network.threshold, network.head.classes, network.new) == ({0: "cat", 1: "dog"}, 0.7, 6, 1)
    network.palette[2] = "dog"
    assert Segmenter.palette == {0: "background", 1: "cat"}
    network.deep_supervision = True  # no change
    assert not hasattr(network, "deploy")
    with pytest.raises(AttributeError, match="config: the forward of Segmenter read"):
        _ = network.config
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = network.unknown


def test_attributes_survive_files_of_fxfact(traced: fx.GraphModule, tmp_path: Path) -> None:
    fxfact.save(traced, tmp_path / "small.pt")
    network: Any = fxfact.load(tmp_path / "small.pt", Segmenter().eval())
    assert network.names == {0: "cat"}
    assert is_refused(lambda: setattr(network, "deep_supervision", False), "deep_supervision")


def test_modules_keep_a_setting_that_forward_reads(image: Tensor) -> None:
    network: Any = fxfact.factorize(Segmenter().eval(), rank=0.5, example_inputs=image, capture="modules", verify=True)
    assert isinstance(network(image), list)
    network.deep_supervision = False
    assert isinstance(network(image), Tensor)


def test_setting_that_is_read_through_another_name_cannot_be_changed(image: Tensor) -> None:
    class Sharing(Small):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"head": {"scale": 2.0}, "epochs": 3}
            self.scaling = self.config["head"]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scaling["scale"]

    network: Any = fxfact.factorize(Sharing(), rank=0.5, example_inputs=image)
    network.config["epochs"] = 4
    assert is_refused(lambda: network.config["head"].pop("scale"), "")


def test_module_of_ones_own_that_was_traced_into_cannot_be_replaced(image: Tensor) -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    class Net(Small):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.known = Swish(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.own(self.known(x)))

    network: Any = fxfact.factorize(Net().eval(), rank=0.5, example_inputs=image)
    assert is_refused(lambda: setattr(network, "own", nn.Identity()), "own")
    before = network(image)
    network.known = nn.Tanh()
    assert not network(image).equal(before)


def test_traced_network_is_trained_compiled_and_exported(traced: fx.GraphModule, image: Tensor) -> None:
    expected = traced(image)[0]
    assert torch.export.export(traced, (image,)).module()(image)[0].allclose(expected, atol=1e-5)
    assert torch.compile(traced, backend="eager", fullgraph=True)(image)[0].allclose(expected, atol=1e-5)
    torch.optim.SGD(traced.parameters(), 0.1).zero_grad()
    traced.train().to(torch.float64).requires_grad_(False)
    assert traced(image.double())[0].allclose(expected.double(), atol=1e-4)
    assert fx.symbolic_trace(traced)(image.double())[0].shape == expected.shape


def test_reading_leaves_classes_as_they_are(image: Tensor) -> None:
    class Asking(Small):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if type(self) is Asking and type(self.first) is nn.Conv2d else -y

    model = Asking().eval()
    result = fxfact.factorize(model, rank=0.5, example_inputs=image, capture="trace", verify=True)
    assert isinstance(result, fx.GraphModule)
    assert "__getattribute__" not in vars(nn.Module)
