"""Which rank for which convolution. A strategy is a file here; it is handed all it needs and fetches nothing."""

from fxfact.ranks.base import Candidate, Choice, RankStrategy
from fxfact.ranks.requested import ByPath, Requested

__all__ = ["ByPath", "Candidate", "Choice", "RankStrategy", "Requested"]
