"""The range between the stages of chains, and how often half precision overflows there and not in the dense layer.

    python -m benchmarks.half_precision                  # minutes on a core
    python -m benchmarks.half_precision --layers 200

Each factorization gets random layers: 1-D to 3-D, strided, dilated, grouped, depthwise, pointwise and transposed, at
random ranks. Their weights have a common part, in all or in some channels, a decaying spectrum, or none of these. The
inputs are noise, also rectified, with a part that is common to all channels, to all positions, or to both. They are
scaled so that the dense layer's largest output is up to 60000, in fp16 and bf16. ``inner / output`` is the
largest value between the stages, as a share of the largest one of the chain's output: the 99th percentile, the largest
share and that without the powers of two that balance the stages.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import save, show
from fxfact.conv import ConvChain, ConvLayer, ConvSpec, run
from fxfact.factorizations import FACTORIZATIONS, Factorization, base

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SPECS = (
    ConvSpec.parse(24, 48, (3, 3), padding=1), ConvSpec.parse(48, 16, (3, 5), stride=(2, 1), padding=(1, 2)),
    ConvSpec.parse(16, 16, (3, 3), dilation=2), ConvSpec.parse(32, 64, (1, 1)), ConvSpec.parse(3, 32, (7, 7), stride=2),
    ConvSpec.parse(16, 32, (3, 3), groups=4), ConvSpec.parse(12, 24, (3, 3), groups=12), ConvSpec.parse(16, 1, (3, 3)),
    ConvSpec.parse(24, 32, 9, order=1, padding=4), ConvSpec.parse(16, 24, 5, order=1, stride=2, groups=2),
    ConvSpec.parse(8, 16, (3, 3, 3), padding=1), ConvSpec.parse(8, 16, (3, 1, 3), stride=(1, 2, 1), groups=2),
    ConvSpec.parse(32, 16, (4, 4), stride=2, padding=1, transposed=True),
    ConvSpec.parse(16, 24, (3, 3), stride=2, groups=2, output_padding=1, transposed=True),
    ConvSpec.parse(24, 12, 8, order=1, stride=4, padding=2, transposed=True),
    ConvSpec.parse(8, 12, (2, 2, 2), stride=2, transposed=True), ConvSpec.parse(24, 24, (1, 1), transposed=True),
)  # fmt: skip


def random_weight(spec: ConvSpec, draw: random.Random) -> Tensor:
    """Return a weight of unit gain for noise, possibly with a common part or a decaying spectrum."""
    weight, ones = torch.randn(spec.weight_shape), [1] * spec.order
    kind, size = draw.randrange(5), draw.choice((0.1, 0.3, 1.0))
    if kind == 1:
        weight += size
    elif kind == 2:
        weight += size * torch.randn(spec.out_channels, 1, *ones)
    elif kind == 3:
        weight += size * torch.randn(1, spec.weight_shape[1], *ones)
    elif kind == 4:
        left, singular, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        weight = (left * singular * torch.logspace(0, -2, len(singular)) @ right).reshape(spec.weight_shape)
    return weight / math.prod(spec.weight_shape[1:]) ** 0.5


def random_input(spec: ConvSpec, draw: random.Random) -> Tensor:
    """Return noise, possibly rectified, with a part that channels, positions or both have in common."""
    sizes, ones = (8, 9, 7)[: spec.order], [1] * spec.order
    x, size = torch.randn(2, spec.in_channels, *sizes), draw.choice((0.3, 1.0, 3.0))
    common = (torch.zeros(1), torch.ones(1), torch.randn(1, spec.in_channels, *ones), torch.randn(2, 1, *sizes))
    x = x + size * draw.choice(common)
    return x.relu() if draw.random() < 0.5 else x


def random_cases(factorization: Factorization, count: int, draw: random.Random) -> Iterator[tuple[ConvLayer, Any]]:
    """Yield layers that a factorization accepts, with ranks at which the chain has more than one stage."""
    accepted = [spec for spec in SPECS if factorization.rejects(spec) is None]
    ranks = {spec: factorization.ranks(spec) for spec in accepted}
    for _ in range(count):
        spec = draw.choice(accepted)
        yield ConvLayer(spec, random_weight(spec, draw)), draw.choice(ranks[spec])


def in_dtype(conv: ConvLayer | ConvChain, dtype: torch.dtype) -> Any:
    if isinstance(conv, ConvChain):
        return ConvChain(tuple(in_dtype(layer, dtype) for layer in conv.layers))
    return replace(conv, weight=conv.weight.to(dtype))


def peaks(chain: ConvChain, x: Tensor) -> list[float]:
    """Return the largest absolute value after each stage."""
    found = []
    for layer in chain.layers:
        x = run(layer, x)
        found.append(float(x.abs().max()))
    return found


def inner_share(chain: ConvChain, x: Tensor) -> float:
    *inner, output = peaks(in_dtype(chain, torch.float32), x.float())
    return max(inner) / output


def unbalanced(factorization: Factorization, layer: ConvLayer, rank: Any) -> ConvChain:
    """Decompose without the powers of two that balance the stages."""
    balance = base.balance_stages
    base.balance_stages = lambda stages, weights: list(weights)
    try:
        return factorization.decompose(layer, rank)
    finally:
        base.balance_stages = balance


def row_of(factorization: Factorization, dtype: str, count: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    draw, shares, before, overflows, overflows_before = random.Random(seed), [], [], 0, 0
    for layer, rank in random_cases(factorization, count, draw):
        dense, x = in_dtype(layer, DTYPES[dtype]), random_input(layer.spec, draw)
        largest, dense_peak = 10 ** draw.uniform(2, math.log10(6e4)), float(run(layer, x).abs().max())
        x = (x * min(largest / dense_peak, 6e4 / float(x.abs().max()))).to(DTYPES[dtype])
        chain, other = factorization.decompose(dense, rank), unbalanced(factorization, layer, rank)
        shares.append(inner_share(chain, x))
        before.append(inner_share(other, x))
        if bool(run(dense, x).isfinite().all()):
            overflows += not all(map(math.isfinite, peaks(chain, x)))
            overflows_before += not all(map(math.isfinite, peaks(in_dtype(other, DTYPES[dtype]), x)))
    return {
        "factorization": factorization.name, "dtype": dtype, "layers": count, "overflows": overflows,
        "inner / output, 99 %": sorted(shares)[int(0.99 * (count - 1))], "largest": max(shares),
        "not balanced": max(before), "overflows, not balanced": overflows_before,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2000, help="of all factorizations together, for each dtype")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = []
    for kind in FACTORIZATIONS:
        factorization = replace(kind(), sweeps=5) if kind.name.startswith("cp") else kind()
        for dtype in DTYPES:
            rows.append(row_of(factorization, dtype, math.ceil(given.layers / len(FACTORIZATIONS)), given.seed))
            print(rows[-1], flush=True)
    show("values between the stages in half precision", rows)
    save("half_precision", {"seed": given.seed, "rows": rows})


if __name__ == "__main__":
    main()
