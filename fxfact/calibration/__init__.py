"""What data say of a network: which errors of which kernel its loss can bear. One pass, forward and backward."""

from fxfact.calibration.base import Statistics
from fxfact.calibration.batches import Batches, arguments_for
from fxfact.calibration.collecting import calibrate
from fxfact.calibration.likelihood import CATEGORICAL, GAUSSIAN, Likelihood, LikelihoodRequest, likelihood_for

__all__ = [
    "CATEGORICAL",
    "GAUSSIAN",
    "Batches",
    "Likelihood",
    "LikelihoodRequest",
    "Statistics",
    "arguments_for",
    "calibrate",
    "likelihood_for",
]
