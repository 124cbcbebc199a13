"""Layers, models and measures that several test files use."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import fxfact
from fxfact.analysis.reference import composed_kernels, copy_as_module, prepare_original
from fxfact.conv import ConvLayer, ConvSpec, KroneckerFisher, KroneckerMoment
from fxfact.factorizations import FACTORIZATIONS, CPFactorized, Factorization, Tucker
from fxfact.factorizations.cp import CPMobilenet
from fxfact.graph import with_kernels
from fxfact.utils import Timer

ALL: list[Factorization] = [kind() for kind in FACTORIZATIONS]
EVERY_STAGE: list[Factorization] = [replace(f, keep_full_sides=True) if isinstance(f, Tucker) else f for f in ALL]
QUICK_CP = {"sweeps": 5}


def by_name(factorization: Factorization) -> str:
    return factorization.name


def quick(factorization: Factorization) -> Factorization:
    """The same with few sweeps, where the quality of the approximation does not matter."""
    return (
        replace(factorization, **QUICK_CP) if isinstance(factorization, CPFactorized | CPMobilenet) else factorization
    )


SPECS = {
    "plain": ConvSpec.parse(6, 8, (3, 3), bias=True),
    "strided": ConvSpec.parse(6, 8, (3, 5), stride=(2, 1), padding=(1, 2), bias=True),
    "dilated": ConvSpec.parse(6, 8, (3, 3), dilation=(1, 2), padding=(0, 2)),
    "same, even kernel": ConvSpec.parse(4, 6, (4, 3), padding="same", bias=True),
    "uneven padding, strided": replace(ConvSpec.parse(4, 6, (3, 3), stride=2), padding=((0, 1), (2, 0))),
    "reflect": ConvSpec.parse(6, 5, (3, 3), padding=1, padding_mode="reflect"),
    "replicate, uneven": ConvSpec.parse(6, 5, (4, 4), padding="same", padding_mode="replicate", bias=True),
    "circular": ConvSpec.parse(5, 6, (3, 3), padding=2, padding_mode="circular", stride=(1, 2)),
    "groups": ConvSpec.parse(8, 12, (3, 3), padding=1, groups=2, bias=True),
    "depthwise": ConvSpec.parse(4, 4, (3, 3), padding=1, groups=4),
    "depthwise, multiplied": ConvSpec.parse(4, 8, (3, 3), groups=4, bias=True),
    "1-D": ConvSpec.parse(6, 8, 5, order=1, stride=2, padding=2, bias=True),
    "1-D circular": ConvSpec.parse(6, 4, 4, order=1, padding="same", padding_mode="circular"),
    "3-D": ConvSpec.parse(4, 6, (3, 3, 3), padding=(1, 0, 1), stride=(1, 2, 1), bias=True),
    "3-D, thin": ConvSpec.parse(4, 6, (3, 1, 3), padding=(1, 2, 0), stride=(2, 2, 1)),
    "3-D, thin first": ConvSpec.parse(4, 6, (1, 3, 3), padding=(1, 1, 0), stride=(2, 1, 2), bias=True),
    "one axis": ConvSpec.parse(6, 8, (1, 7), padding=(1, 3), stride=(2, 1)),
    "pointwise": ConvSpec.parse(6, 8, (1, 1), stride=2, padding=1, bias=True),
    "pointwise, grouped": ConvSpec.parse(6, 12, (1, 1), groups=3),
    "transposed": ConvSpec.parse(6, 8, (3, 3), stride=2, padding=1, output_padding=1, transposed=True, bias=True),
    "transposed, grouped, dilated": ConvSpec.parse(
        8, 12, (3, 4), stride=(2, 1), dilation=(1, 2), padding=(0, 1), output_padding=(0, 1), groups=2, transposed=True
    ),
    "transposed 1-D": ConvSpec.parse(6, 4, 4, order=1, stride=2, padding=1, transposed=True, bias=True),
    "transposed 3-D": ConvSpec.parse(4, 6, (3, 1, 2), stride=(2, 2, 1), output_padding=(1, 1, 0), transposed=True),
    "transposed depthwise": ConvSpec.parse(4, 4, (3, 3), stride=2, padding=1, groups=4, transposed=True),
    "transposed, dilated": ConvSpec.parse(4, 6, (3, 2), dilation=(3, 2), output_padding=(2, 1), transposed=True),
    "transposed pointwise": ConvSpec.parse(6, 8, (1, 1), stride=2, output_padding=1, transposed=True, bias=True),
    "one input channel": ConvSpec.parse(1, 8, (3, 3), padding=1),
    "one output channel": ConvSpec.parse(8, 1, (3, 3), padding=1, bias=True),
    "linear": ConvSpec.linear(6, 8, bias=True),
    "linear, in × out": ConvSpec.linear(8, 6, transposed=True),
}


def random_layer(spec: ConvSpec, dtype: torch.dtype = torch.float64, seed: int = 0) -> ConvLayer:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(spec.weight_shape, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(spec.out_channels, generator=generator, dtype=torch.float64).to(dtype) if spec.bias else None
    return ConvLayer(spec, weight, bias)


def random_input(spec: ConvSpec, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = (2,)) -> Tensor:
    sizes = [11, 9, 10][: spec.order]
    generator = torch.Generator().manual_seed(1)
    if not spec.order:
        return torch.randn(*batch, 3, spec.in_channels, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randn(*batch, spec.in_channels, *sizes, generator=generator, dtype=torch.float64).to(dtype)


def random_moment(groups: int, size: int, generator: torch.Generator, rank: int | None = None) -> Tensor:
    """Ill-conditioned second moments (groups, size, size)."""
    columns = torch.randn(groups, size, rank or 2 * size, generator=generator, dtype=torch.float64)
    columns = columns * torch.logspace(0, -2, size, dtype=torch.float64)[:, None]
    return columns @ columns.transpose(1, 2)


def random_fisher(spec: ConvSpec, *, rank: int | None = None) -> KroneckerFisher:
    generator, block = torch.Generator().manual_seed(1), spec.block
    positions = math.prod(spec.kernel_size)
    into, out = (1, positions) if spec.transposed else (positions, 1)
    sizes = (block.in_channels * into, block.out_channels * out)
    first, second = (KroneckerMoment((random_moment(spec.groups, size, generator, rank),)) for size in sizes)
    return KroneckerFisher(first, second).damped(1e-3)


def equal_fishers() -> tuple[KroneckerFisher, KroneckerFisher]:
    """A metric of a 3×3 convolution, 6 to 8 channels, with its input moment as a Kronecker product and as a whole."""
    generator = torch.Generator().manual_seed(0)
    channels, positions = random_moment(1, 6, generator), random_moment(1, 9, generator)
    output = KroneckerMoment((random_moment(1, 8, generator),))
    factored = KroneckerFisher(KroneckerMoment((channels, positions)), output)
    whole = KroneckerFisher(KroneckerMoment((torch.kron(channels[0], positions[0])[None],)), output)
    return factored, whole


def apart(expected: Tensor, found: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    assert expected.shape == found.shape
    expected, found = expected.detach().double(), found.detach().double()
    return float((found - expected).norm() / expected.norm())


def with_composed_kernels(original: nn.Module | ExportedProgram, factorized: nn.Module | ExportedProgram) -> nn.Module:
    """A copy of the original with the kernels that the stages of the factorized network compose to."""
    plan = fxfact.plan_of(factorized)
    return with_kernels(prepare_original(original, plan), composed_kernels(copy_as_module(factorized), plan))


def params_of(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def has_state(model: nn.Module, expected: Mapping[str, Tensor]) -> bool:
    """Whether the state dict has these tensors."""
    return all(value.equal(expected[name]) for name, value in model.state_dict().items())


def skip_reasons(network: Any) -> dict[str, str]:
    """The reason of every convolution that the plan of a network skips, by path."""
    return {decision.path: decision.reason for decision in fxfact.plan_of(network) if decision.reason}


def factorized(model: nn.Module, inputs: Any, **options: Any) -> Any:
    """A model factorized with verification. The model itself is checked to be unchanged."""
    before = copied_state(model)
    settings: dict[str, Any] = {"rank": 0.5, "example_inputs": inputs, "verify": True, "allow_growth": True, **options}
    result = fxfact.factorize(model, ["tucker", "channel_svd"], **settings)
    assert has_state(model, before)
    return result


class Small(nn.Module):
    """Two plain convolutions, one of them strided, around a norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class EqualLayers(nn.Module):
    """Convolutions of equal shape, unlike in all else, and linear layers; ``others`` adds layers of other kinds."""

    def __init__(self, *, others: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False),
                nn.Conv2d(8, 8, 3, stride=2, padding=1),
            ]
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in self.convs)
        self.heads = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False)])
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean)
        kinds = (
            {
                "left": lambda: nn.Conv2d(8, 8, 3),
                "grouped": lambda: nn.Conv2d(8, 8, 3, groups=2),
                "up": lambda: nn.ConvTranspose2d(8, 8, 3),
                "tied": lambda: nn.Conv2d(8, 8, 3),
            }
            if others
            else {}
        )
        self.others = list(kinds)
        for name, make in kinds.items():
            self.add_module(name, nn.ModuleList([make(), make()]))
        if others:
            self.tied[1].weight = self.tied[0].weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = sum(layer(x).mean((2, 3), keepdim=True) for name in self.others for layer in self.get_submodule(name)) + x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        x = x.mean((2, 3))
        return self.heads[0](x) * self.heads[1](x)


ENTRIES = [(8, 1), (10, 14), (10, 12), (10, 8), (10, 99)]  # encrypted; LZMA, bzip2, deflate, and what there is not


def with_entries(archive: bytes, place: int, value: int) -> bytes:
    """A zip archive with the flags (at 8) or the method of compression (at 10) of all its entries replaced."""
    parts = archive.split(b"PK\x01\x02")
    entries = (part[: place - 4] + value.to_bytes(2, "little") + part[place - 2 :] for part in parts[1:])
    return b"PK\x01\x02".join([parts[0], *entries])


def rewrite_archive(
    path: Path, change: Callable[[str, bytes], bytes], added: Mapping[str, bytes] | None = None
) -> None:
    """Write a zip archive again with every member changed, and with members added to its folder."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(members)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))
        for name, data in (added or {}).items():
            archive.writestr(f"{folder}/{name}", data)


class Classifier(nn.Module):
    """A plain, a grouped and a transposed convolution, a norm, and logits over four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 16, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.up(torch.relu(self.grouped(x)))).mean((2, 3)))


class Branching(Small):
    """Python that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 1e9 else x + 1)


class ThreeConvs(nn.Module):
    """Three convolutions, a batch norm after the first, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 48, 3, padding=1)
        self.third = nn.Conv2d(48, 48, 3, padding=1)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(self.third(torch.relu(self.second(x))).mean((2, 3)))


class BranchingThreeConvs(ThreeConvs):
    """Python that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > -1e9 else -x)


_Calls = Sequence[Callable[[], Any]]


def millions_of_macs(call: Callable[[], Any]) -> float:
    """The multiply-accumulates of a call in millions, plus 0.01 so that no call takes no time."""
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 2e6 + 0.01


class FakeTimer(Timer):
    """Returns made-up milliseconds, so that tests know them.

    By default a million multiply-accumulates take a millisecond.

    Args:
        turns: returns the milliseconds of each call in each turn, for single layers and chains.
        side_by_side: returns the milliseconds of each call, for whole networks. Default: those of ``turns``.

    ``calls_timed`` lists how many calls were timed together each time.
    """

    def __init__(
        self,
        turns: Callable[[_Calls], list[list[float]]] | None = None,
        side_by_side: Callable[[_Calls], list[float]] | None = None,
    ) -> None:
        self._turns, self._side_by_side = turns, side_by_side
        self.calls_timed: list[int] = []

    def turns(self, calls: _Calls, **options: Any) -> list[list[float]]:
        self.calls_timed.append(len(calls))
        return [[millions_of_macs(call)] * 3 for call in calls] if self._turns is None else self._turns(calls)

    def graph_turns(self, calls: _Calls, device: torch.device, **options: Any) -> list[list[float]]:
        return self.turns(calls)

    def side_by_side(self, calls: _Calls, **options: Any) -> list[float]:
        self.calls_timed.append(len(calls))
        if self._side_by_side is not None:
            return self._side_by_side(calls)
        return [millions_of_macs(call) for call in calls]
