"""Brings a factorized network closer to its original, without labels: refit (closed form) and distill (training)."""

from fxfact.finetune.distill import DistillResult, distill
from fxfact.finetune.refit import RefitResult, refit

__all__ = ["DistillResult", "RefitResult", "distill", "refit"]
