"""How much the loss increases at every rank of a factorization: computed at a few ranks, interpolated in between."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxfact.conv import ConvLayer, ConvSpec, KroneckerFisher, compose
from fxfact.errors import PlanError
from fxfact.factorizations import Factorization, Rank, WeightedLayer, weight_scale
from fxfact.utils import atomic_write, no_reduced_precision

ErrorCurve = list[tuple[Rank, float]]
_MAX_COMPUTED_RANKS = 6  # of a curve, unless there is an estimate from singular values
_LARGEST_COMPUTED = 0.9  # as a fraction of the list of candidate ranks
_FILE_FORMAT = {"format": "fxfact error curves", "version": 1}


class ErrorCurveCache:
    """Error curves that were computed before, for plans that are made again.

    Pass the same cache to several calls of ``fxfact.plan`` or ``fxfact.factorize`` with a budget: only the first one
    computes the curves. A curve is found again only for the same convolution with the same weight values, the same
    statistics, and the same factorization with the same options and candidate ranks. A cache may serve several models.
    """

    def __init__(self) -> None:
        self._curves: dict[str, ErrorCurve] = {}

    def __len__(self) -> int:
        return len(self._curves)

    def __iter__(self) -> Iterator[str]:
        return iter(self._curves)

    def __contains__(self, key: object) -> bool:
        return key in self._curves

    def __getitem__(self, key: str) -> ErrorCurve:
        return self._curves[key]

    def __setitem__(self, key: str, curve: ErrorCurve) -> None:
        self._curves[key] = curve

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the curves to a JSON file.

        Args:
            path: the file. It is written whole or not at all.

        Raises:
            PlanError: if the file cannot be written.
        """
        content = {**_FILE_FORMAT, "curves": dict(sorted(self._curves.items()))}
        try:
            with atomic_write(path) as file:
                file.write(json.dumps(content, indent=0).encode())
        except (OSError, TypeError) as error:
            raise PlanError(f"{path}: the error curves cannot be written there: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ErrorCurveCache:
        """Read curves that ``save`` wrote.

        Args:
            path: the file.

        Returns:
            A new cache.

        Raises:
            PlanError: if the file cannot be read, is damaged, or is of another version.
        """
        cache = cls()
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            cache._curves = _parse_curves(content["curves"])
            found = {key: content[key] for key in _FILE_FORMAT}
        except (OSError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            raise PlanError(f"{path}: these are no error curves that can be read: {error}") from error
        if found != _FILE_FORMAT:
            raise PlanError(f"{path}: expected {_FILE_FORMAT}, found {found}. Save the error curves again.")
        return cache


def _parse_curves(data: dict[str, Any]) -> dict[str, ErrorCurve]:
    curves = {
        key: [(tuple(int(entry) for entry in rank), float(increase)) for rank, increase in curve]
        for key, curve in data.items()
    }
    if not all(curve and all(math.isfinite(increase) for _, increase in curve) for curve in curves.values()):
        raise ValueError("a curve is empty, or an increase is not finite")
    return curves


def cache_key(
    factorization: Factorization, spec: ConvSpec, ranks: Sequence[Rank], weight_digest: str, statistics_digest: str
) -> str:
    """Return the key of a curve: everything that a curve depends on."""
    described = json.dumps([asdict(factorization), asdict(spec), ranks], sort_keys=True)
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    return f"{factorization.name} {digest} of {weight_digest} under {statistics_digest}"


def error_curves(
    layer: ConvLayer, families: Sequence[tuple[Factorization, Sequence[Rank]]], fisher: KroneckerFisher | None
) -> list[ErrorCurve]:
    """Return the curve of every factorization of a layer: the estimated loss increase in nats, ascending ranks.

    Without ``fisher`` the values are ‖W − Ŵ‖² / ‖W‖², or an estimate of it. This is the expensive part of planning;
    it takes and returns values only, so that it can run in another process. The factorizations come together, because
    they share what is known of the kernel in its metric.
    """
    weighted = None if fisher is None else WeightedLayer(layer, fisher)
    return [_error_curve(layer, factorization, ranks, weighted) for factorization, ranks in families]


def _error_curve(
    layer: ConvLayer, factorization: Factorization, ranks: Sequence[Rank], weighted: WeightedLayer | None
) -> ErrorCurve:
    """Return one curve: at all ranks if that is cheap, else at a few."""
    with no_reduced_precision(layer.weight.device):
        if weighted is None and (estimates := factorization.error_estimates(layer, ranks)) is not None:
            return list(zip(ranks, estimates, strict=True))
        if weighted is not None and not factorization.is_fitted:
            return list(zip(ranks, factorization.loss_increases(weighted, ranks), strict=True))
        computed = _computed_ranks(ranks)
        if weighted is not None:
            return list(zip(computed, factorization.loss_increases(weighted, computed), strict=True))
        return [(rank, relative_square_error(layer, factorization, rank)) for rank in computed]


def joint_error_curves(
    layers: Sequence[ConvLayer],
    factorization: Factorization,
    ranks: Sequence[Rank],
    fishers: Sequence[KroneckerFisher | None],
) -> list[ErrorCurve]:
    """Return the curve of every layer of a joint set, whose chains share stages, as ``error_curves`` for single layers.

    The increases are those of the chains that ``Factorization.decompose_jointly`` returns.
    """
    curves: list[ErrorCurve] = [[] for _ in layers]
    for rank in _computed_ranks(ranks):
        chains = factorization.decompose_jointly(layers, rank, fishers)
        for curve, layer, chain, fisher in zip(curves, layers, chains, fishers, strict=True):
            curve.append((rank, _error_of(layer, compose(chain), fisher)))
    return curves


def _error_of(layer: ConvLayer, kernel: Tensor, fisher: KroneckerFisher | None) -> float:
    """Return the loss increase of another kernel in nats, or without ``fisher`` the relative square error."""
    difference = kernel.double() - layer.weight.double()
    if fisher is not None:
        return fisher.loss_increase(layer.spec, difference)
    return float(difference.square().sum() / layer.weight.double().square().sum().clamp_min(1e-300))


def _computed_ranks(ranks: Sequence[Rank]) -> list[Rank]:
    """Return the ranks at which a curve is computed, closer to each other among the small ones."""
    positions = np.linspace(0, _LARGEST_COMPUTED, _MAX_COMPUTED_RANKS) ** 1.5 * (len(ranks) - 1)
    return [ranks[k] for k in np.unique(positions.round().astype(int))]


def relative_square_error(layer: ConvLayer, factorization: Factorization, rank: Rank) -> float:
    """Return ‖W − Ŵ‖² / ‖W‖² of the chain that is closest in the Frobenius norm, always from the same start."""
    dense = (layer.weight / weight_scale(layer.weight)).float()
    layer = replace(layer, weight=dense)
    chain = factorization.decompose(layer, rank, generator=torch.Generator(dense.device).manual_seed(0))
    with no_reduced_precision(dense.device):
        difference = compose(chain) - dense
    return float(difference.square().sum() / dense.square().sum().clamp_min(1e-30))


def interpolate(curve: ErrorCurve, ranks: Sequence[Rank]) -> list[float]:
    """Return the loss increase for each of the ranks.

    The logarithm of the increase is interpolated linearly over the sum of the rank. Ranks above the largest computed
    one, which save little and take long to compute, get its value.
    """
    sizes, increases = [sum(rank) for rank, _ in curve], [value for _, value in curve]
    decreasing = np.minimum.accumulate(np.maximum(increases, 1e-12 * max(increases, default=0.0) + 1e-300))
    found: list[float] = np.exp(np.interp([sum(rank) for rank in ranks], sizes, np.log(decreasing))).tolist()
    return found
