"""A factorized network brought nearer to its original, without labels: in closed form, or by training."""

from fxfact.finetune.distill import DistillResult, distill
from fxfact.finetune.refit import RefitResult, refit

__all__ = ["DistillResult", "RefitResult", "distill", "refit"]
