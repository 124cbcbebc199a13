"""Code of others that edits a factorized model: folds norms, equalizes channels, freezes, merges adapters."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.conv import FactorizedModule
from fxfact.errors import FxfactError, WeightError
from tests.support import apart, copied_state, has_state


def randomize_norms(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for tensor in (norm.weight, norm.running_var):
                tensor.data.uniform_(0.5, 2, generator=generator)
            for tensor in (norm.bias, norm.running_mean):
                tensor.data.normal_(generator=generator)
    return model.eval()


def gain_of(norm: Any) -> Tensor:
    return norm.weight / (norm.running_var + norm.eps).sqrt()


def folded_bias(conv: Any, norm: Any) -> Tensor:
    before = torch.zeros_like(norm.running_mean) if conv.bias is None else conv.bias
    return (before - norm.running_mean) * gain_of(norm) + norm.bias


# Folding of norms, as deployment code spells it


def fold_by_data(conv: Any, norm: Any) -> nn.Module:
    shape = [1] * conv.weight.ndim
    shape[1 if conv.transposed else 0] = -1
    conv.weight.data = conv.weight.data * gain_of(norm).view(shape)
    bias = folded_bias(conv, norm)
    if conv.bias is None:
        conv.register_parameter("bias", nn.Parameter(bias))
    else:
        conv.bias.data = bias
    return conv


@torch.no_grad()
def fold_in_place(conv: Any, norm: Any) -> nn.Module:
    bias = folded_bias(conv, norm)
    if conv.transposed:
        conv.weight.mul_(gain_of(norm).view(1, -1, *[1] * (conv.weight.ndim - 2)))
    else:
        conv.weight.copy_(torch.mm(torch.diag(gain_of(norm)), conv.weight.flatten(1)).view(conv.weight.shape))
    conv.bias = nn.Parameter(bias)
    return conv


@torch.no_grad()
def fold_row_by_row(conv: Any, norm: Any) -> nn.Module:
    bias = folded_bias(conv, norm)
    rows = conv.weight.transpose(0, 1) if conv.transposed else conv.weight
    for row, gain in zip(rows, gain_of(norm), strict=True):
        row.mul_(gain)
    conv.bias = nn.Parameter(bias)
    return conv


def fold_by_torch(conv: Any, norm: Any) -> nn.Module:
    return nn.utils.fusion.fuse_conv_bn_eval(conv, norm, transpose=conv.transposed)


FOLDS = [fold_by_data, fold_in_place, fold_row_by_row, fold_by_torch]
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "2-D": lambda: nn.Conv2d(16, 32, 3, padding=1),
    "2-D without bias": lambda: nn.Conv2d(16, 32, 3, stride=2, bias=False),
    "grouped": lambda: nn.Conv2d(16, 32, 3, groups=2, padding=1),
    "1-D": lambda: nn.Conv1d(16, 32, 5, padding=2, bias=False),
    "3-D": lambda: nn.Conv3d(16, 24, 3, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(16, 24, 3, stride=2),
    "transposed 1-D without bias": lambda: nn.ConvTranspose1d(16, 24, 4, stride=2, bias=False),
    "reflecting": lambda: nn.Conv2d(16, 24, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", ["tucker", "spatial_svd"])
def test_a_norm_is_folded_into_a_factorized_convolution(name: str, fold: Any, method: str) -> None:
    conv: Any = LAYERS[name]()
    order = conv.weight.ndim - 2
    if method == "spatial_svd" and order == 1:
        method = "channel_svd"
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[order - 1](conv.out_channels)
    model = randomize_norms(nn.Sequential(conv, norm, nn.ReLU()))
    x = torch.randn(2, 16, *[9, 8, 7][:order])
    small = fxfact.factorize(model, method, rank=0.5, capture="modules", example_inputs=x)
    assert isinstance(small[0], FactorizedModule)
    expected = small(x)
    small[0], small[1] = fold(small[0], small[1]), nn.Identity()
    assert isinstance(small[0], FactorizedModule)
    assert apart(expected, small(x)) < 1e-5
    assert apart(expected, copy.deepcopy(small)(x)) < 1e-5


class TwoConvs(nn.Module):
    """Two convolutions with a ReLU between them, which may depend on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(24, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) if x.sum() < 1e9 else x)


@pytest.mark.parametrize("method", ["tucker", "cp_mobilenet", "tt", "spatial_svd", "channel_svd"])
def test_cross_layer_equalization_acts(method: str) -> None:
    x = torch.randn(2, 8, 9, 9)
    small = fxfact.factorize(TwoConvs(), method, rank=0.5, capture="modules", example_inputs=x)
    expected = small(x)
    first, second = small.first, small.second
    scale = (first.weight.abs().amax((1, 2, 3)) / second.weight.abs().amax((0, 2, 3))).sqrt()
    with torch.no_grad():
        first.weight.div_(scale.view(-1, 1, 1, 1))
        first.bias.div_(scale)
        second.weight.mul_(scale.view(1, -1, 1, 1))
    ranges = first.weight.abs().amax((1, 2, 3)), second.weight.abs().amax((0, 2, 3))
    torch.testing.assert_close(*ranges, rtol=1e-3, atol=1e-3)
    assert apart(expected, small(x)) < 1e-5


def test_a_half_precision_model_is_folded_and_one_with_tied_layers_is_not_scaled_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x if x.sum() < 1e9 else -x))

    x = torch.randn(2, 8, 9, 9)
    small = fxfact.factorize(Tied(), "tucker", rank=0.5, capture="modules", example_inputs=x)
    kept = small.two.weight.clone()
    norm = randomize_norms(nn.BatchNorm2d(8))
    expected = small.two(norm(small.one(x)))
    small.one.weight, small.one.bias = nn.utils.fuse_conv_bn_weights(
        small.one.weight,
        small.one.bias,
        *(getattr(norm, n) for n in ("running_mean", "running_var", "eps")),
        norm.weight,
        norm.bias,
    )
    assert small.two.weight.equal(kept)
    assert apart(expected, small(x)) < 1e-5
    half = small.half()
    expected = norm(half.one(x.half()).float())
    fold_by_data(half.one, norm.half())
    assert apart(expected, half.one(x.half()).float()) < 5e-3


def test_what_cannot_act_is_refused_and_names_the_layer() -> None:
    x = torch.randn(2, 8, 9, 9)
    small = fxfact.factorize(TwoConvs(), "tucker", rank=0.5, capture="modules", example_inputs=x)
    before, expected = copied_state(small), small(x)

    def initialize(module: nn.Module) -> None:
        if module is small.first:
            nn.init.xavier_uniform_(module.weight)

    def clip() -> None:
        for parameter in (small.first.weight, small.second.weight):
            parameter.data.clamp_(-0.01, 0.01)

    for edit in (
        lambda: small.apply(initialize),
        clip,
        lambda: torch.optim.SGD([small.first.weight, small.second.weight], 0.1),
        lambda: nn.utils.prune.l1_unstructured(small.first, "weight", 0.3),
    ):
        with pytest.raises(WeightError, match=r"^first \(FactorizedConv2d\): .*to_conv\(\)"):
            edit()
    assert has_state(small, before)
    assert small(x).equal(expected)
    small.first = small.first.to_conv()
    nn.utils.prune.l1_unstructured(small.first, "weight", 0.0001)
    assert apart(expected, small(x)) < 1e-2


# A detector like the YOLO family's


class Block(nn.Module):
    """Convolution, norm and SiLU. ``fuse`` of the model folds the norm and swaps forward."""

    def __init__(self, into: int, out: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(into, out, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Block(channels, channels // 2, 1), Block(channels // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class Concat(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, 1)


class Head(nn.Module):
    """Predicts boxes at two scales. It caches the anchor points and strides of the last shape."""

    def __init__(self, channels: tuple[int, ...], classes: int = 3) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(Block(c, c), nn.Conv2d(c, 4 + classes, 1)) for c in channels)
        self.stride = torch.tensor([8.0, 16.0])
        self.shape: torch.Size | None = None

    def forward(self, x: list[Tensor]) -> Tensor:
        maps = [branch(level) for branch, level in zip(self.branches, x, strict=True)]
        if self.shape != maps[0].shape:
            self.shape = maps[0].shape
            sizes = [level.shape[-2] * level.shape[-1] for level in maps]
            self.strides = torch.cat([s.expand(n) for s, n in zip(self.stride, sizes, strict=True)])
        found = torch.cat([level.flatten(2) for level in maps], 2)
        return torch.cat([found[:, :4] * self.strides, found[:, 4:].sigmoid()], 1)


class Detector(nn.Module):
    """Runs its modules by their indices ``i`` and the indices ``f`` of their inputs."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[tuple[int | list[int], nn.Module]] = [
            (-1, Block(3, 16, stride=2)),
            (-1, Block(16, 32, stride=2)),
            (-1, Residual(32)),
            (-1, Block(32, 32, stride=2)),
            (-1, Residual(32)),
            (-1, Block(32, 48, stride=2)),
            (-1, nn.Upsample(scale_factor=2)),
            ([-1, 4], Concat()),
            (-1, Block(80, 32)),
            ([8, 5], Head((32, 48))),
        ]
        self.model = nn.Sequential(*(part for _, part in parts))
        for index, (source, part) in enumerate(parts):
            part.i, part.f = index, source  # type: ignore[assignment]
        self.names = {0: "cat", 1: "dog", 2: "bird"}

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for part in self.model:
            source: Any = part.f
            if source != -1:
                x = outputs[source] if isinstance(source, int) else [x if s == -1 else outputs[s] for s in source]
            x = part(x)
            outputs.append(x)
        return x

    def fuse(self, fold: Callable[[Any, Any], nn.Module]) -> Detector:
        for module in self.modules():
            if isinstance(module, Block) and hasattr(module, "bn"):
                module.conv = fold(module.conv, module.bn)
                del module.bn
                module.forward = module.forward_fuse  # type: ignore[method-assign]
        return self


def new_conv(conv: Any, norm: Any) -> nn.Module:
    """Fold into a new convolution, as older deployment code does."""
    fused = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    fused.weight.data.copy_(conv.weight * gain_of(norm).view(-1, 1, 1, 1))
    fused.bias.data.copy_(folded_bias(conv, norm))
    return fused.requires_grad_(False)


@pytest.mark.parametrize("fold", [*FOLDS, new_conv])
def test_a_detector_is_fused_after_it_was_factorized(fold: Any) -> None:
    torch.manual_seed(0)
    model, x = randomize_norms(Detector()), torch.randn(2, 3, 64, 64)
    capture = "auto" if fold is fold_by_data else "modules"
    small = fxfact.factorize(model, ["tucker", "svd"], rank=0.6, capture=capture, example_inputs=x)
    assert len(fxfact.plan_of(small).rewrites) >= 8
    assert (type(small), small.model[9].stride.tolist(), small.names[1]) == (Detector, [8, 16], "dog")
    expected = small(x)
    small.fuse(fold)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    assert apart(expected, small(x)) < 1e-5
    other = torch.randn(1, 3, 96, 64)
    assert small(other).shape == model(other).shape
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    if fold is new_conv:
        return
    assert sum(isinstance(module, FactorizedModule) for module in small.modules()) >= 8
    file.seek(0)
    again = copy.deepcopy(small)
    again.load_state_dict(torch.load(file))
    assert again(x).equal(small(x))


def test_a_detector_is_fused_before_it_is_factorized() -> None:
    model, x = randomize_norms(Detector()), torch.randn(2, 3, 64, 64)
    expected = model(x)
    model.fuse(fold_by_data)
    assert apart(expected, model(x)) < 1e-5
    small = fxfact.factorize(model, "tucker", rank=0.6, capture="modules", example_inputs=x, verify=True)
    assert small(x).shape == expected.shape


def test_a_fused_model_cannot_be_loaded_into_the_model_from_before(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    small = fxfact.factorize(randomize_norms(Detector()), "tucker", rank=0.6, capture="modules", example_inputs=x)
    fxfact.save(small, tmp_path / "before.pt")
    expected = small(x)
    fxfact.save(small.fuse(fold_by_data), tmp_path / "fused.pt")
    loaded = fxfact.load(tmp_path / "before.pt", Detector().eval())
    assert apart(expected, loaded.fuse(fold_by_data)(x)) < 1e-5
    with pytest.raises(FxfactError, match=r"bn\.|bias"):
        fxfact.load(tmp_path / "fused.pt", Detector())
