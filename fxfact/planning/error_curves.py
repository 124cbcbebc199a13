"""By how much the loss grows with every rank of a factorization: few computed, the others read off between them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import torch

from fxfact.conv import ConvLayer, KroneckerFisher, compose
from fxfact.factorizations import Factorization, Rank, pow2_scale
from fxfact.utils import no_reduced_precision

ErrorCurve = list[tuple[Rank, float]]
ErrorCurves = dict[str, ErrorCurve]  # by factorization and its options, and the numbers of the kernel
_COMPUTED, _LAST = 6, 0.9  # ranks of a factorization without a formula; the last of them, among all


def cache_key(factorization: Factorization) -> str:
    """A name for it and its options."""
    return f"{factorization.name} {json.dumps(asdict(factorization), sort_keys=True)}"


def error_curve(
    layer: ConvLayer, factorization: Factorization, among: Sequence[Rank], metric: KroneckerFisher | None
) -> ErrorCurve:
    """Nats for ranks, those among which may ever be chosen, ascending; without a metric ‖W − Ŵ‖² / ‖W‖², or what it is
    at most. This is what takes long; it takes and gives values only.

    Where no formula gives them all, increases are computed at six ranks at most, nearer to each other among the small
    ones, where they change most.
    """
    with no_reduced_precision(layer.weight.device):
        return _curve(layer, factorization, among, metric)


def _curve(
    layer: ConvLayer, factorization: Factorization, among: Sequence[Rank], metric: KroneckerFisher | None
) -> ErrorCurve:
    if metric is None and (bounds := factorization.bounds(layer, among)) is not None:
        return list(zip(among, bounds, strict=True))
    places = np.linspace(0, _LAST, _COMPUTED) ** 1.5 * (len(among) - 1)
    computed = [among[k] for k in np.unique(places.round().astype(int))]
    if metric is not None:
        return list(zip(computed, factorization.increases(layer, metric, computed), strict=True))
    return [(rank, relative_square(layer, factorization, rank)) for rank in computed]


def relative_square(layer: ConvLayer, factorization: Factorization, rank: Rank) -> float:
    """‖W − Ŵ‖² / ‖W‖² of the chain that comes nearest in the Frobenius norm, always from the same start."""
    dense = (layer.weight / pow2_scale(layer.weight)).float()
    layer = replace(layer, weight=dense)
    chain = factorization.decompose(layer, rank, generator=torch.Generator(dense.device).manual_seed(0))
    with no_reduced_precision(dense.device):
        missed = compose(chain) - dense
    return float(missed.square().sum() / dense.square().sum().clamp_min(1e-30))


def interpolate(known: ErrorCurve, ranks: Sequence[Rank]) -> list[float]:
    """Nats for each of the ranks: between those computed, their logarithm is interpolated over the rank. The largest
    ranks, which save little and take long, count as the last that was computed.
    """
    sizes, nats = [sum(rank) for rank, _ in known], [value for _, value in known]
    lowest = np.minimum.accumulate(np.maximum(nats, 1e-12 * max(nats, default=0.0) + 1e-300))
    found: list[float] = np.exp(np.interp([sum(rank) for rank in ranks], sizes, np.log(lowest))).tolist()
    return found
