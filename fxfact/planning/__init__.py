"""Decide first: a plan holds no tensors and no nodes, so it can be printed, edited, saved, and carried out later."""

from fxfact.planning.base import Plan
from fxfact.planning.decision import Decision
from fxfact.planning.making import Selection, make_plan

__all__ = ["Decision", "Plan", "Selection", "make_plan"]
