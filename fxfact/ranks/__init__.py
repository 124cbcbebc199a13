"""Which rank for which convolution. A strategy is a file here; it is handed all it needs and fetches nothing."""

from fxfact.ranks.base import Allocation, Candidate, Choice, FrontPoint, RankStrategy
from fxfact.ranks.budgets import Budget, Latency, Loss, Macs, Params
from fxfact.ranks.requested import ByPath, FactorizationRequest, Requested, parse_several
from fxfact.ranks.rules import VBMF, Energy, LargestThatPays, RankRule
from fxfact.ranks.within_budget import WithinBudget

__all__ = [
    "VBMF",
    "Allocation",
    "Budget",
    "ByPath",
    "Candidate",
    "Choice",
    "Energy",
    "FactorizationRequest",
    "FrontPoint",
    "LargestThatPays",
    "Latency",
    "Loss",
    "Macs",
    "Params",
    "RankRule",
    "RankStrategy",
    "Requested",
    "WithinBudget",
    "parse_several",
]
