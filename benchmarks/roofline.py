"""The limit of the speed-up on this machine: every convolution and every stage of its chain on the roofline.

    python -m benchmarks.roofline --network resnet18 --batch 1 --threads 2 --share 0.45      # a minute or two

Convolutions run as the compiler runs them with frozen weights. ``peak`` is the best rate of any convolution here,
``bandwidth`` that of reading memory that no cache holds. The ``bound`` of a stage is the larger of MACs divided by the
peak, and of the bytes of weights, input and output divided by the bandwidth (Williams, Waterman and Patterson 2009).
``of the bound`` is the bound divided by the measured time. ``faster, all at the peak`` is the speed-up of the network
if every stage took as long as its bound, and everything else as long as in the dense network.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import fxfact
from benchmarks.report import save, show
from benchmarks.untrained import TIMED
from fxfact.conv import ConvSpec, Sizes, write_conv
from fxfact.search.packed_convs import pack_chain
from fxfact.utils import milliseconds

_UNCACHED = 256 * 2**20  # bytes, more than any cache holds


def stages_of(plan: fxfact.Plan, *, dense: bool) -> Iterator[tuple[str, ConvSpec, Sizes]]:
    """Yield the path of every convolution, its spec (or those of its stages), and the spatial size of the input."""
    for decision in plan:
        assert decision.spec is not None
        for entering in decision.input_sizes or ():
            size = entering
            for spec in (decision.spec,) if dense else decision.stages:
                yield decision.path, spec, size
                size = spec.output_size(size)


def measured(found: list[tuple[str, ConvSpec, Sizes]], batch: int) -> list[float]:
    """Return the milliseconds of each stage alone, measured in turns."""
    calls = []
    for _, spec, size in found:
        x = torch.randn(batch, spec.in_channels, *size).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(spec.weight_shape).contiguous(memory_format=torch.channels_last)
        conv = nn.Sequential(*write_conv(spec, weight, torch.zeros(spec.out_channels) if spec.bias else None))
        calls.append(partial(pack_chain(conv.eval().requires_grad_(requires_grad=False), x), x))
    return [min(times) for times in milliseconds(calls, repeats=15, number=1)]


def work(spec: ConvSpec, size: Sizes, batch: int) -> tuple[int, int]:
    """Return the MACs, and the least number of bytes to move."""
    shapes = [(batch, spec.in_channels, *size), (batch, spec.out_channels, *spec.output_size(size)), spec.weight_shape]
    return batch * spec.macs(size), 4 * sum(torch.Size(shape).numel() for shape in shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = [name for name, made in TIMED.items() if len(made.input_shape) == 3]
    parser.add_argument("--network", choices=images, default="resnet18")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--share", type=float, default=0.45, help="budget, as a share of the dense time")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    name = given.network
    model = TIMED[name].build().eval()
    x = torch.randn(given.batch, *TIMED[name].input_shape)
    plan = fxfact.plan(model, budget=fxfact.Latency(given.share, compiled=True), example_inputs=x)
    uncached = torch.randn(_UNCACHED // 4)
    bandwidth = _UNCACHED / min(milliseconds([uncached.sum])[0])  # bytes in a millisecond
    dense, chains = (list(stages_of(plan, dense=kind)) for kind in (True, False))
    times = measured([*dense, *chains], given.batch)
    amounts = [work(spec, size, given.batch) for _, spec, size in [*dense, *chains]]
    peak = max(macs / ms for (macs, _), ms in zip(amounts, times, strict=True))
    rows: list[dict[str, Any]] = []
    for k, ((path, spec, _), (macs, moved), ms) in enumerate(zip([*dense, *chains], amounts, times, strict=True)):
        bound = max(macs / peak, moved / bandwidth)
        rows.append({
            "of": "dense" if k < len(dense) else "chain", "path": path, "convolution": str(spec), "MACs": macs,
            "bytes": moved, "ms": ms, "GMAC/s": macs / ms / 1e6, "bound": bound, "of the bound": bound / ms,
        })  # fmt: skip
    show(f"{name}, batch {given.batch}, {given.threads} threads", rows, ".3g")
    ms, bounds = (
        {of: sum(r[key] for r in rows if r["of"] == of) for of in ("dense", "chain")} for key in ("ms", "bound")
    )
    assert plan.network.ms is not None
    assert plan.after.ms is not None
    assert plan.network.macs is not None
    assert plan.after.macs is not None
    rest = max(0.0, plan.network.ms - ms["dense"])
    total = {
        "peak, GMAC/s": peak / 1e6, "bandwidth, GB/s": bandwidth / 1e6, "dense ms": plan.network.ms,
        "of it convolutions": ms["dense"], "fewer MACs": plan.network.macs / plan.after.macs,
        "faster, predicted": plan.network.ms / plan.after.ms,
        "faster, stages as measured": plan.network.ms / (rest + ms["chain"]),
        "faster, all at the peak": plan.network.ms / (rest + bounds["chain"]),
    }  # fmt: skip
    show("whole network", [total], ".3g")
    save(f"roofline-{name}", {"stages": rows, "whole": [total]})


if __name__ == "__main__":
    main()
