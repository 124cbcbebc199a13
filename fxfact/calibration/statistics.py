"""The statistics of a network on data. They can be saved, and plans can be made from them in seconds."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fxfact.calibration.likelihood import Likelihood
from fxfact.calibration.output_parts import OutputPart
from fxfact.conv import ConvSpec, KroneckerFisher, KroneckerMoment, LowRankMoment
from fxfact.errors import CalibrationError
from fxfact.utils import atomic_write

_FORMAT = {"format": "fxfact statistics", "version": 6}
_DAMPING = 1e-3
_LEAST_SHRINKAGE = 0.5  # of the moments of gradients towards a multiple of the identity


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """The Fisher information of a network's convolutions on some data, which ``fxfact.calibrate`` collects.

    The Fisher information of a layer is approximated by the Kronecker product of the second moments of its inputs and
    of the gradients at its output (K-FAC: Martens and Grosse 2015; Grosse and Martens 2016). It predicts by how much
    the loss grows when the weight of the layer changes.

    Attributes:
        samples: The number of samples.
        outputs: The network's outputs and the distributions that gradients were drawn from. Empty if the caller passed
            a likelihood of their own.
        specs: The convolutions by path. Convolutions that share a weight are listed once, by the first path.
        moments: The moments of each convolution by path, without those that no gradient reached.
        likelihood: The likelihood that the caller passed. Files do not hold it.
    """

    samples: int
    outputs: tuple[OutputPart, ...]
    specs: Mapping[str, ConvSpec]
    moments: Mapping[str, KroneckerFisher]
    likelihood: Likelihood | None = None

    def fisher(self, path: str, spec: ConvSpec) -> KroneckerFisher | None:
        """Return the Fisher information of a convolution, regularized for planning.

        The moments are shrunk by an amount that depends on the number of samples (oracle approximating shrinkage: Chen,
        Wiesel, Eldar and Hero 2010), and a thousandth of the mean of the diagonal is added to the diagonal.

        Args:
            path: The path of the convolution in the model.
            spec: The convolution that the model has there.

        Returns:
            The moments, in nats per sample, or None if no gradient reached the convolution.

        Raises:
            CalibrationError: The statistics were collected on another convolution.
        """
        if path not in self.moments:
            return None
        if self.specs[path] != spec:
            raise CalibrationError(
                f"{path}: the statistics are of {self.specs[path]}, but the model has {spec}. Calibrate this model."
            )
        known = self.moments[path]
        shrunk = KroneckerFisher(known.input.shrunk(self.samples), known.output.shrunk(self.samples, _LEAST_SHRINKAGE))
        return shrunk.damped(_DAMPING)

    def check(self, paths: Sequence[str]) -> None:
        """Check that the statistics cover at least one of a model's convolutions.

        Args:
            paths: The paths of the model's convolutions.

        Raises:
            CalibrationError: They cover none of them.
        """
        if paths and not any(path in self.moments for path in paths):
            known = ", ".join(list(self.moments)[:3])
            raise CalibrationError(
                f"the statistics cover none of the layers ({', '.join(paths[:3])}, …), but others: {known}. "
                "Calibrate this model."
            )

    def digest(self, path: str) -> str:
        """Return a digest of one layer's statistics, to be used as a cache key.

        It covers the layer's spec, the number of samples and the diagonals of the moments. The diagonals are cheap to
        hash, and they differ if the data or the weights differ.

        Args:
            path: The path of the convolution.

        Returns:
            32 hexadecimal digits.
        """
        spec, moments = self.specs.get(path), self.moments.get(path)
        header = [self.samples, None if spec is None else vars(spec)]
        result = hashlib.sha256(json.dumps(header).encode())
        for moment in () if moments is None else (moments.input, moments.output):
            for diagonal in moment.diagonals:
                values = diagonal.detach().contiguous().cpu().numpy()
                result.update(f"{tuple(diagonal.shape)}".encode() + values.tobytes())
        return result.hexdigest()[:32]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics to a file, a NumPy archive (.npz) of plain arrays and JSON, without pickle.

        Args:
            path: The file.

        Raises:
            CalibrationError: The file cannot be written.
        """
        header = {
            **_FORMAT,
            "samples": self.samples,
            "outputs": [part.to_json() for part in self.outputs],
            "specs": {name: vars(spec) for name, spec in self.specs.items()},
        }
        arrays = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
        for name, metric in self.moments.items():
            for side, moment in (("input", metric.input), ("output", metric.output)):
                if isinstance(moment, LowRankMoment):
                    arrays[f"{side}.rows.{name}"] = moment.rows.cpu().numpy()
                    continue
                arrays |= {f"{side}.{k}.{name}": factor.cpu().numpy() for k, factor in enumerate(moment.factors)}
        try:
            with atomic_write(path) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except (OSError, TypeError) as error:
            raise CalibrationError(f"{path}: the statistics cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read the statistics that ``save`` wrote.

        Args:
            path: The file.

        Returns:
            The statistics.

        Raises:
            CalibrationError: The file cannot be read, is damaged, or has another format or version.
        """
        try:
            if os.path.exists(path) and not zipfile.is_zipfile(path):
                raise CalibrationError(f"{path}: this is not an archive of statistics, or it is incomplete")
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "header"}
                header = json.loads(file["header"].tobytes())
            if {key: header[key] for key in _FORMAT} != _FORMAT:
                raise CalibrationError(
                    f"{path}: expected {_FORMAT}, got {header['format']!r}, version {header['version']}. Recalibrate."
                )
            return cls(
                samples=header["samples"],
                outputs=tuple(map(OutputPart.from_json, header["outputs"])),
                specs={name: ConvSpec.from_json(spec) for name, spec in header["specs"].items()},
                moments={name: _moments(name, arrays) for name in header["specs"]},
            )
        except CalibrationError:
            raise
        except Exception as error:  # a damaged file can raise anything
            raise CalibrationError(f"{path}: the statistics cannot be read: {error}") from error


def _moments(name: str, arrays: Mapping[str, torch.Tensor]) -> KroneckerFisher:
    """Return the moments of one convolution. Raises ValueError if they are not finite."""
    sides: list[KroneckerMoment] = []
    for side in ("input", "output"):
        rows = arrays.get(f"{side}.rows.{name}")
        factors = [arrays[key] for k in range(2) if (key := f"{side}.{k}.{name}") in arrays]
        factors = factors if rows is None else [rows]
        if not all(bool(factor.isfinite().all()) for factor in factors):
            raise ValueError(f"the moments of {name} contain NaN or Inf")
        sides.append(KroneckerMoment(tuple(factors)) if rows is None else LowRankMoment(rows))
    return KroneckerFisher(*sides)
