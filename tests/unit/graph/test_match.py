"""Which convolutions of a graph are found, and why others are skipped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fxfact
from fxfact.capture import capture
from fxfact.conv import ConvSite, Skip, path_of
from fxfact.graph import match
from tests.support import Small, apart


def verdicts(model: nn.Module) -> dict[str, ConvSite | Skip]:
    return {path_of(item): item for item in capture(model, how="trace").found}


class Scaled(nn.Conv2d):
    """A subclass that computes its weight, as weight standardisation does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 2, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Plainly(nn.Conv2d):
    """A subclass whose forward is the convolution itself."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)


class Zoo(nn.Module):
    """A convolution of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Conv2d(8, 8, 3, padding=1)
        self.subclass = Plainly(8, 8, 3, padding=1)
        self.scaled = Scaled(8, 8, 3, padding=1)
        self.hooked = nn.Conv2d(8, 8, 3, padding=1)
        self.hooked.register_forward_pre_hook(lambda module, args: None)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.transposed = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.read = nn.Conv2d(8, 8, 3, padding=1)
        self.never = nn.Conv2d(8, 8, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) / 9)
        self.register_buffer("constant", torch.randn(8, 8, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transposed(self.hooked(self.scaled(self.subclass(self.module(x)))))
        x = self.read(self.normed(x)) * self.read.weight.mean()
        x = torch.conv2d(x, self.kernel, padding="same")
        x = F.conv2d(input=x, weight=self.constant, padding=1)
        x = F.conv_transpose2d(x, self.kernel, padding=1)
        return F.conv2d(x, x.mean((0, 2, 3)).reshape(1, 8, 1, 1))


def test_match_finds_every_convolution_or_says_why_not() -> None:
    found = verdicts(Zoo())
    reasons = {path: item.reason for path, item in found.items() if isinstance(item, Skip)}
    sites = {path for path, item in found.items() if isinstance(item, ConvSite)}
    assert sites == {"module", "subclass", "transposed", "constant"}
    expected = {
        "scaled": None,  # traced through: its call is functional, on a computed weight
        "hooked": "hooks",
        "normed": "computed from other parameters",
        "read": "weight or bias is also read by mean",
        "never": "does not call",
        "kernel": "used by calls with different settings",
    }
    for path, word in expected.items():
        if word is not None:
            assert word in reasons.pop(path)
    assert len(reasons) == 2
    assert all("computed in the graph" in reason for reason in reasons.values())


def test_match_has_a_verdict_for_every_node() -> None:
    captured = capture(Zoo(), how="trace")
    found = match(captured.network).verdicts
    assert list(found) == list(captured.network.graph.nodes)
    assert all(item.reason for item in found.values() if isinstance(item, Skip))


def test_match_skips_a_convolution_whose_bias_is_read_elsewhere(image: Tensor) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) - self.conv.bias.reshape(-1, 1, 1)

    model = Reading()
    result = fxfact.factorize(model, example_inputs=image, capture="trace")
    assert "bias is also read by reshape" in fxfact.plan_of(result)["conv"].reason
    assert result(image).equal(model(image))
    result = fxfact.factorize(model, example_inputs=image, verify=True)  # a FactorizedModule has a bias to read
    assert [d.path for d in fxfact.plan_of(result).rewrites] == ["conv"]


def test_match_skips_weights_shared_by_different_convolutions(image: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(4, 4, 3, padding=1)
            self.up = nn.ConvTranspose2d(4, 4, 3, padding=1)
            self.up.weight = self.down.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x))

    class BothWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)

    class TwoGroups(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(2, 4, 3, padding=1)
            self.other = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(x[:, :2]))

    for model in (Tied(), BothWays(), TwoGroups()):
        result = fxfact.factorize(model, rank=0.5, example_inputs=image, verify=True)
        assert fxfact.plan_of(result).rewrites == ()
        assert not {id(p) for p in model.parameters()} & {id(p) for p in result.parameters()}
        assert result(image).equal(model(image))


def test_match_skips_a_weight_that_is_used_with_different_settings(image: Tensor) -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, padding=1) + F.conv2d(x, self.weight, padding=2, dilation=2)

    (decision,) = fxfact.plan(Pyramid())
    assert "different settings" in decision.reason
    assert fxfact.factorize(Pyramid())(image).shape == image.shape


def test_match_finds_every_functional_form(small: Small, image: Tensor) -> None:
    aten = torch.ops.aten

    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels = nn.ParameterList([torch.randn(4, 4, 3, 3) / 6 for _ in range(7)])

        def forward(self, x: Tensor) -> Tensor:
            k = self.kernels
            x = aten.conv2d.default(x, k[0], None, [1], [1])
            x = aten.conv2d.padding(x, k[1], None, [1, 1], "same")
            x = aten.convolution.default(x, k[2], None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
            x = aten.convolution.default(x, k[3], None, [2, 2], [1, 1], [1, 1], True, [1, 0], 1)
            x = torch.convolution(x, k[4], None, [1, 1], [0, 0], [1, 2], False, [0, 0], 1)
            x = aten.conv_transpose2d.input(x, k[5], None, [2, 2])
            return F.conv_transpose2d(x, k[6], stride=2, output_padding=1, dilation=2)

    model = Spelled()
    assert [d.path for d in fxfact.plan(model)] == [f"kernels.{k}" for k in range(7)]
    for inputs in (image, None):
        source = model if inputs is not None else torch.export.export(model, (image,))
        result = fxfact.factorize(source, "tt", example_inputs=inputs, verify=True, allow_growth=True, rank=10**6)
        assert len(fxfact.plan_of(result).rewrites) == 7
        assert apart(model(image), (result if inputs is not None else result.module())(image)) < 1e-5


def test_match_lists_a_convolution_that_is_not_supported() -> None:
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.shift = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.conv_tbc(x, self.kernel, self.shift)

    (decision,) = fxfact.plan(Spelled())
    assert "a convolution that fxfact does not support" in decision.reason


def test_match_lists_a_pruned_convolution(small: Small) -> None:
    prune.l1_unstructured(small.first, "weight", 0.5)
    result = fxfact.factorize(small)
    assert [d.factorization is None for d in fxfact.plan_of(result)] == [True, False, True]


def test_every_site_of_a_graph_can_be_rewritten() -> None:
    torch.manual_seed(0)
    model, x = Zoo().eval(), torch.randn(2, 8, 12, 12)
    options = {"rank": 10**6, "example_inputs": x, "allow_growth": True, "verify": True, "capture": "trace"}
    result = fxfact.factorize(model, "spatial_svd", **options)
    assert {d.path for d in fxfact.plan_of(result).rewrites} == {"module", "subclass", "transposed", "constant"}
    assert apart(model(x), result(x)) < 1e-4
    names = set(dict(result.named_parameters()))
    assert {"module.0.weight", "module.1.bias", "subclass.0.weight", "constant.1.weight", "kernel"} <= names
    assert not any(name in names for name in ("module.weight", "subclass.weight", "subclass.bias"))
    assert "constant" not in dict(result.named_buffers())
    trained = {name for name, p in result.named_parameters() if p.requires_grad}
    assert "constant.0.weight" not in trained
    assert "module.0.weight" in trained
