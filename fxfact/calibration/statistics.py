"""The statistics of a network on data: a value to keep in a file, from which plans are made again in seconds."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fxfact.conv import ConvSpec, KroneckerFisher, KroneckerMoment
from fxfact.errors import CalibrationError
from fxfact.utils import atomic_write

_FORMAT = {"format": "fxfact statistics", "version": 3}
_DAMPING = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Second moments of every convolution that gradients reached, by path; those that share a weight under the first.

    ``samples`` is how many there were, ``likelihood`` the name of what labels were drawn from. The moments of gradients
    count shrunk by ``shrinkage`` at least. ``curves`` keeps increases of the loss that planning has computed: by path,
    then by the factorization (its name and options), pairs of a rank and nats. It is filled as plans are made, and
    saved along.
    """

    samples: int
    likelihood: str
    shrinkage: float
    specs: Mapping[str, ConvSpec]
    moments: Mapping[str, KroneckerFisher]
    curves: dict[str, dict[str, list[tuple[tuple[int, ...], float]]]] = field(default_factory=dict)

    def metric(self, path: str, spec: ConvSpec) -> KroneckerFisher | None:
        """What errors of a convolution cost, shrunk as the number of samples asks for and damped by a thousandth of the
        mean; None where no gradient reached it.

        Raises CalibrationError where the statistics are of another convolution.
        """
        if path not in self.moments:
            return None
        if self.specs[path] != spec:
            raise CalibrationError(
                f"{path}: the statistics are of {self.specs[path]}, the model has {spec}. Calibrate it."
            )
        known = self.moments[path]
        shrunk = KroneckerFisher(known.input.shrunk(self.samples), known.output.shrunk(self.samples, self.shrinkage))
        return shrunk.damped(_DAMPING)

    def check(self, paths: Sequence[str]) -> None:
        """Raise CalibrationError where they know none of the convolutions at these paths."""
        if paths and not any(path in self.moments for path in paths):
            known = ", ".join(list(self.moments)[:3])
            raise CalibrationError(
                f"the statistics know none of the convolutions ({', '.join(paths[:3])}, …), but others: {known}. "
                "Calibrate this model."
            )

    def digest(self, path: str) -> str:
        """A short hexadecimal digest of the statistics of the layer at ``path``, to be used as a cache key.

        It covers the layer's spec, the number of samples, the likelihood, the shrinkage and the diagonals of the
        moments' factors. Diagonals are cheap to hash, and they differ if the data or the weights differ.
        """
        spec, moments = self.specs.get(path), self.moments.get(path)
        header = [self.samples, self.likelihood, self.shrinkage, None if spec is None else vars(spec)]
        result = hashlib.sha256(json.dumps(header).encode())
        for moment in () if moments is None else (moments.input, moments.output):
            for factor in moment.factors:
                diagonal = factor.detach().diagonal(dim1=1, dim2=2).contiguous().cpu()
                result.update(f"{tuple(factor.shape)}".encode() + diagonal.numpy().tobytes())
        return result.hexdigest()[:32]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a NumPy archive of plain arrays and JSON, without pickle. Raises CalibrationError."""
        header = {
            **_FORMAT,
            "samples": self.samples,
            "likelihood": self.likelihood,
            "shrinkage": self.shrinkage,
            "specs": {name: vars(spec) for name, spec in self.specs.items()},
            "curves": self.curves,
        }
        arrays = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
        for name, metric in self.moments.items():
            for side, moment in (("input", metric.input), ("output", metric.output)):
                arrays |= {f"{side}.{k}.{name}": factor.cpu().numpy() for k, factor in enumerate(moment.factors)}
        try:
            with atomic_write(path) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except (OSError, TypeError) as error:
            raise CalibrationError(f"{path}: the statistics cannot be written there: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what ``save`` wrote. Raises CalibrationError."""
        try:
            if os.path.exists(path) and not zipfile.is_zipfile(path):
                raise CalibrationError(f"{path}: this is no archive of statistics, or not all of it")
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "header"}
                header = json.loads(file["header"].tobytes())
            if {key: header[key] for key in _FORMAT} != _FORMAT:
                raise CalibrationError(f"{path}: {header['format']} {header['version']} is not {_FORMAT}")
            return cls(
                samples=header["samples"],
                likelihood=header["likelihood"],
                shrinkage=header["shrinkage"],
                specs={name: ConvSpec.from_json(spec) for name, spec in header["specs"].items()},
                moments={name: _metric(name, arrays) for name in header["specs"]},
                curves={
                    name: {kind: [(tuple(rank), nats) for rank, nats in curve] for kind, curve in curves.items()}
                    for name, curves in header["curves"].items()
                },
            )
        except CalibrationError:
            raise
        except Exception as error:  # whatever the reader finds
            raise CalibrationError(f"{path}: these are no statistics that can be read: {error}") from error


def _metric(name: str, arrays: Mapping[str, torch.Tensor]) -> KroneckerFisher:
    """Raises ValueError for what is no number."""
    sides = []
    for side in ("input", "output"):
        factors = [arrays[key] for k in range(2) if (key := f"{side}.{k}.{name}") in arrays]
        if not all(bool(factor.isfinite().all()) for factor in factors):
            raise ValueError(f"the moments of {name} hold NaN or Inf")
        sides.append(KroneckerMoment(tuple(factors)))
    return KroneckerFisher(*sides)
