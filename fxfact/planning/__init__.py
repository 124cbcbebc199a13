"""From a request or a budget to a ``Plan``. Runs no network."""

from fxfact.planning import rank_rules
from fxfact.planning.allocation import BudgetAllocator, allocate, least_amount
from fxfact.planning.budgets import Budget, Latency, Loss, Macs, Metric, Params, Speedup
from fxfact.planning.build import (
    KINDS,
    Kinds,
    PlanDraft,
    SearchScope,
    Selection,
    build_plan,
    draft_plan,
    warn_without_data,
)
from fxfact.planning.call import describe_call, format_call
from fxfact.planning.decision import Decision, summarize_reasons
from fxfact.planning.error_curves import ErrorCurveCache
from fxfact.planning.fixed_ranks import FactorizationRequest, FixedRanks, parse_factorizations
from fxfact.planning.joint_sets import Joint
from fxfact.planning.layer_options import LayerOptions
from fxfact.planning.pareto import MeasuredPoint, ParetoFront
from fxfact.planning.pareto_plot import check_plot_path
from fxfact.planning.plan import Plan
from fxfact.planning.plan_table import format_nats
from fxfact.planning.rank_rules import VBMF, Energy, LargestThatPays, RankRule
from fxfact.planning.strategy import (
    Allocation,
    Alternative,
    ByPath,
    Candidate,
    Choice,
    LatencyModel,
    Layout,
    ParetoPoint,
    RankStrategy,
)

__all__ = [
    "KINDS",
    "VBMF",
    "Allocation",
    "Alternative",
    "Budget",
    "BudgetAllocator",
    "ByPath",
    "Candidate",
    "Choice",
    "Decision",
    "Energy",
    "ErrorCurveCache",
    "FactorizationRequest",
    "FixedRanks",
    "Joint",
    "Kinds",
    "LargestThatPays",
    "Latency",
    "LatencyModel",
    "LayerOptions",
    "Layout",
    "Loss",
    "Macs",
    "MeasuredPoint",
    "Metric",
    "Params",
    "ParetoFront",
    "ParetoPoint",
    "Plan",
    "PlanDraft",
    "RankRule",
    "RankStrategy",
    "SearchScope",
    "Selection",
    "Speedup",
    "allocate",
    "build_plan",
    "check_plot_path",
    "describe_call",
    "draft_plan",
    "format_call",
    "format_nats",
    "least_amount",
    "parse_factorizations",
    "rank_rules",
    "summarize_reasons",
    "warn_without_data",
]
