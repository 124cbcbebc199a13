"""Every factorization, each in a file of its own. A new one is a file here and its class in ``FACTORIZATIONS``."""

from __future__ import annotations

import difflib

from fxfact.errors import ArgumentError, ArgumentTypeError
from fxfact.factorizations.base import Factorization, Rank
from fxfact.factorizations.cp import CPFactorized, CPMobilenet
from fxfact.factorizations.matrix_svd import ChannelSVD, PointwiseSVD
from fxfact.factorizations.rank_spec import ParsedRank, RankSpec, parse_rank_spec, resolve_rank
from fxfact.factorizations.scaling import check_generator, check_weight, pow2_scale
from fxfact.factorizations.spatial_svd import SpatialSVD
from fxfact.factorizations.tt import TT
from fxfact.factorizations.tucker import Tucker

FACTORIZATIONS: tuple[type[Factorization], ...] = (
    CPMobilenet,
    CPFactorized,
    Tucker,
    TT,
    SpatialSVD,
    ChannelSVD,
    PointwiseSVD,
)

__all__ = [
    "FACTORIZATIONS",
    "TT",
    "CPFactorized",
    "CPMobilenet",
    "ChannelSVD",
    "Factorization",
    "ParsedRank",
    "PointwiseSVD",
    "Rank",
    "RankSpec",
    "SpatialSVD",
    "Tucker",
    "check_generator",
    "check_weight",
    "parse_factorization",
    "parse_rank_spec",
    "pow2_scale",
    "resolve_rank",
]


def parse_factorization(request: object) -> Factorization:
    """A factorization for its name ('cp' is 'cp_mobilenet', a hyphen is an underscore) or for itself.

    Raises ArgumentError for an unknown name, ArgumentTypeError for anything else.
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
