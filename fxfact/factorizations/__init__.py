"""The factorizations: each replaces a convolution by a chain of cheaper ones.

Every factorization is a class. To add one to the package, write it in a file of this folder and list it in
``FACTORIZATIONS``. A factorization of your own needs no registration: pass an instance wherever a name is accepted. See
``Factorization`` for the methods to override.
"""

from __future__ import annotations

import difflib

from fxfact.errors import ArgumentError, ArgumentTypeError
from fxfact.factorizations.base import Factorization, check_generator, check_weight
from fxfact.factorizations.cp import CPFactorized, CPMobilenet
from fxfact.factorizations.linalg import truncated_svd, weight_scale
from fxfact.factorizations.matrix_svd import SVD, ChannelSVD
from fxfact.factorizations.rank_spec import ParsedRank, RankSpec, parse_rank_spec, resolve_rank
from fxfact.factorizations.spatial_svd import SpatialSVD
from fxfact.factorizations.stages import Rank, format_rank, pointwise, stages_along
from fxfact.factorizations.tt import TT
from fxfact.factorizations.tucker import Tucker
from fxfact.factorizations.weighted_kernel import WeightedKernel, WeightedLayer

FACTORIZATIONS: tuple[type[Factorization], ...] = (
    CPMobilenet,
    CPFactorized,
    Tucker,
    TT,
    SpatialSVD,
    ChannelSVD,
    SVD,
)
"""The classes of all factorizations of the package."""

__all__ = [
    "FACTORIZATIONS",
    "SVD",
    "TT",
    "CPFactorized",
    "CPMobilenet",
    "ChannelSVD",
    "Factorization",
    "ParsedRank",
    "Rank",
    "RankSpec",
    "SpatialSVD",
    "Tucker",
    "WeightedKernel",
    "WeightedLayer",
    "check_generator",
    "check_weight",
    "format_rank",
    "parse_factorization",
    "parse_rank_spec",
    "pointwise",
    "resolve_rank",
    "stages_along",
    "truncated_svd",
    "weight_scale",
]


def parse_factorization(request: object) -> Factorization:
    """Return a factorization, given by name or as an object.

    Args:
        request: a name in any case, with hyphens or underscores ('cp' means 'cp_mobilenet'), or a ``Factorization``,
            which is returned as it is.

    Returns:
        The factorization, with default options if it was given by name.

    Raises:
        ArgumentError: if there is no factorization of this name.
        ArgumentTypeError: if ``request`` is of another type.
    """
    if isinstance(request, Factorization):
        return request
    if not isinstance(request, str):
        raise ArgumentTypeError(
            f"factorization must be a name or a fxfact.factorizations.Factorization, got {request!r}. "
            "Pass a name, an object, a list of these, or a mapping from path to these."
        )
    by_name = {cls.name: cls for cls in FACTORIZATIONS}
    name = request.lower().replace("-", "_")
    name = CPMobilenet.name if name == "cp" else name
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(f"unknown factorization {request!r}.{hint} The names are 'cp', {', '.join(by_name)}.")
    return by_name[name]()
