"""Time, error and memory of decompositions, compared with TensorLy, on the 3×3 layers of ResNet-18 and ResNet-50.

    python -m benchmarks.decompose            # about 6 minutes on two cores
    python -m benchmarks.decompose --quick    # layers of up to 128 channels

Tucker-2 at half of the parameters is compared with ``tensorly.decomposition.partial_tucker`` (its defaults). CP of
(out, in, 3, 3) at a tenth of the parameters is compared with ``parafac`` (its default start). Both run 10 sweeps, and
ours also until it is as accurate. If ``tensorly-torch`` is installed, its ``FactorizedConv.from_conv`` is measured as
well (CP only up to 128 channels, because it takes a minute at 256). The kernels are random, like the initial ones of
the networks. Times are medians of turns in one process. Times of whole networks are sums over the layers by their
counts, not measured as a whole. Memory is the peak of the resident set above what was resident before, in a process
that returns freed memory at once (Linux).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from tensorly.tenalg import multi_mode_dot
from torch import Tensor, nn

import fxfact
from benchmarks.networks import NETWORKS
from benchmarks.report import in_turns, median, save, show
from fxfact.conv import ConvLayer, ConvSpec, compose
from fxfact.factorizations import CPFactorized, Tucker

SWEEPS = 10
Shape = tuple[int, int]


def layer_counts(network: str) -> Counter[Shape]:
    """Return (out, in) of every 3×3 convolution, with the number of its occurrences."""
    plan = fxfact.plan(NETWORKS[network].load())
    specs = [decision.spec for decision in plan if decision.spec and decision.spec.kernel_size == (3, 3)]
    return Counter((spec.out_channels, spec.in_channels) for spec in specs)


def kernel_of(shape: Shape) -> ConvLayer:
    generator = torch.Generator().manual_seed(0)
    bound = (9 * shape[1]) ** -0.5
    weight = torch.empty(*shape, 3, 3).uniform_(-bound, bound, generator=generator)
    return ConvLayer(ConvSpec.parse(shape[1], shape[0], (3, 3)), weight)


@dataclass(frozen=True)
class Method:
    """``decompose`` is timed. ``kernel`` returns the dense kernel that equals its result."""

    decompose: Callable[[], Any]
    kernel: Callable[[Any], Tensor]

    def error(self, layer: ConvLayer) -> float:
        return float((self.kernel(self.decompose()) - layer.weight).norm() / layer.weight.norm())


def tucker_methods(layer: ConvLayer) -> dict[str, Method]:
    rank = Tucker().rank_within(layer.spec, 0.5)
    assert rank is not None
    methods = {
        "ours": Method(lambda: Tucker().decompose(layer, rank), compose),
        "tensorly": Method(
            lambda: partial_tucker(layer.weight, rank, modes=[0, 1])[0],
            lambda found: multi_mode_dot(found[0], found[1], modes=[0, 1]),
        ),
    }
    return methods | from_conv(layer, "tucker", (*rank, 3, 3))


def cp_methods(layer: ConvLayer) -> dict[str, Method]:
    """Return our CP and TensorLy's, with the same number of sweeps."""
    rank = cp_rank(layer)
    methods = {
        "ours": our_cp(layer, SWEEPS),
        "tensorly": Method(
            lambda: parafac(layer.weight, rank, n_iter_max=SWEEPS, tol=0, random_state=0), tensorly.cp_to_tensor
        ),
    }
    return methods | (from_conv(layer, "cp", rank) if max(layer.weight.shape) <= 128 else {})


def from_conv(layer: ConvLayer, factorization: str, rank: object) -> dict[str, Method]:
    """Return TensorLy-Torch's layer, if it is installed."""
    try:
        tltorch = importlib.import_module("tltorch")
    except ImportError:
        return {}
    conv = nn.Conv2d(layer.spec.in_channels, layer.spec.out_channels, 3, bias=False)
    conv.weight = nn.Parameter(layer.weight.clone())
    return {
        "tensorly-torch": Method(
            lambda: tltorch.FactorizedConv.from_conv(conv, rank=rank, factorization=factorization),
            lambda found: found.weight.to_tensor().detach(),
        )
    }


def cp_rank(layer: ConvLayer) -> int:
    rank = CPFactorized().rank_within(layer.spec, 0.1)
    assert rank is not None
    return rank[0]


def our_cp(layer: ConvLayer, sweeps: int) -> Method:
    method = CPFactorized(sweeps=sweeps, tolerance=0)
    return Method(lambda: method.decompose(layer, (cp_rank(layer),)), compose)


def until_as_accurate(layer: ConvLayer, goal: float) -> Method:
    """Return our CP with the fewest sweeps that reach an error."""
    methods = (our_cp(layer, sweeps) for sweeps in range(1, 201))
    return next(method for method in methods if method.error(layer) <= goal)


def measure(kind: str, layer: ConvLayer, repeats: int) -> list[dict[str, Any]]:
    """Return a row for every method on one layer."""
    methods = tucker_methods(layer) if kind == "tucker" else cp_methods(layer)
    errors = {name: method.error(layer) for name, method in methods.items()}
    if kind == "cp":
        methods["ours, as accurate"] = until_as_accurate(layer, errors["tensorly"])
        errors["ours, as accurate"] = methods["ours, as accurate"].error(layer)
    seconds = in_turns({name: method.decompose for name, method in methods.items()}, repeats)
    shape = f"{layer.spec.out_channels}×{layer.spec.in_channels}×3×3"
    base = median(seconds["tensorly"])
    return [
        {
            "layer": shape,
            "method": name,
            "seconds": median(seconds[name]),
            "faster than tensorly": base / median(seconds[name]),
            "relative error": errors[name],
        }
        for name in methods
    ]


def peak_memory(shapes: list[Shape]) -> list[dict[str, Any]]:
    """Return the rows of ``memory_rows``, measured in a process whose allocator returns freed memory at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.decompose", "--memory-of", json.dumps(shapes)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def memory_rows(shapes: list[Shape]) -> list[dict[str, Any]]:
    """Return, for every layer and method, the peak above the memory in use before, in kernels of that layer."""
    rows = []
    small = kernel_of((32, 32))
    for method in (*tucker_methods(small).values(), *cp_methods(small).values()):
        method.decompose()
    for shape in shapes:
        layer = kernel_of(tuple(shape))
        size = layer.weight.numel() * layer.weight.element_size()
        for kind, methods in (("tucker", tucker_methods(layer)), ("cp", cp_methods(layer))):
            for name, method in methods.items():
                extra = peak_during(method.decompose)
                label = f"{shape[0]}×{shape[1]}×3×3"
                rows.append(
                    {"layer": label, "kind": kind, "method": name, "MiB": extra / 2**20, "kernels": extra / size}
                )
    return rows


def peak_during(call: Callable[[], object]) -> int:
    """Return bytes. On Linux, writing 5 to clear_refs resets the peak of the resident set."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def network_row(network: str, kind: str, rows: list[dict[str, Any]], counts: Counter[Shape]) -> dict[str, Any]:
    """Return the seconds of a network, extrapolated by layer counts, and its error, weighted by kernel norms."""
    sums: dict[str, float] = {}
    squares: dict[str, float] = {}
    norms = 0.0
    for shape, count in counts.items():
        norm = float(kernel_of(shape).weight.square().sum()) * count
        norms += norm
        for row in rows:
            if row["layer"] == f"{shape[0]}×{shape[1]}×3×3":
                sums[row["method"]] = sums.get(row["method"], 0.0) + count * row["seconds"]
                squares[row["method"]] = squares.get(row["method"], 0.0) + norm * row["relative error"] ** 2
    result: dict[str, Any] = {"network": network, "kind": kind}
    for name in ("tensorly", "ours", *(["ours, as accurate"] if kind == "cp" else [])):
        result |= {f"{name}: s": sums[name], f"{name}: error": (squares[name] / norms) ** 0.5}
    fastest = "ours, as accurate" if kind == "cp" else "ours"
    return result | {"faster": sums["tensorly"] / sums["ours"], f"faster ({fastest})": sums["tensorly"] / sums[fastest]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="layers of up to 128 channels only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*n_eigenvecs.*")
    tensorly.set_backend("pytorch")
    if given.memory_of:
        print(json.dumps(memory_rows(given.memory_of)))
        return
    counts = {name: layer_counts(name) for name in ("resnet18", "resnet50")}
    shapes = sorted({shape for counter in counts.values() for shape in counter})
    shapes = [shape for shape in shapes if not given.quick or max(shape) <= 128]
    content: dict[str, Any] = {}
    for kind, title in (
        ("tucker", "Tucker-2, half the parameters"),
        ("cp", "CP, a tenth of the parameters, 10 sweeps"),
    ):
        content[kind] = [row for shape in shapes for row in measure(kind, kernel_of(shape), given.repeats)]
        show(title, content[kind], ".4g")
    if not given.quick:
        content["networks"] = [
            network_row(name, kind, content[kind], counter)
            for name, counter in counts.items()
            for kind in ("tucker", "cp")
        ]
        for kind in ("tucker", "cp"):
            rows = [row for row in content["networks"] if row["kind"] == kind]
            show("All 3×3 layers of a network, extrapolated by layer counts", rows, ".4g")
    content["memory"] = peak_memory(shapes)
    show("Peak memory above the memory in use before, in MiB and in kernels of the layer", content["memory"])
    save("decompose", content)


if __name__ == "__main__":
    main()
