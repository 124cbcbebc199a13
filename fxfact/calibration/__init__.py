"""What data say of a network: which errors of which kernel its loss can bear. One pass, forward and backward."""

from fxfact.calibration.base import Statistics
from fxfact.calibration.batches import Batches, arguments_for, first_sample, held_out_of, run_batch, running
from fxfact.calibration.collecting import MOST_SEED, calibrate, place_among_processes
from fxfact.calibration.likelihood import CATEGORICAL, GAUSSIAN, Likelihood, dense_of, known_likelihood, likelihood_for
from fxfact.calibration.measuring import ReferenceOutputs, is_below_zero, mean_and_error
from fxfact.calibration.moments import Window

__all__ = [
    "CATEGORICAL",
    "GAUSSIAN",
    "MOST_SEED",
    "Batches",
    "Likelihood",
    "ReferenceOutputs",
    "Statistics",
    "Window",
    "arguments_for",
    "calibrate",
    "dense_of",
    "first_sample",
    "held_out_of",
    "is_below_zero",
    "known_likelihood",
    "likelihood_for",
    "mean_and_error",
    "place_among_processes",
    "run_batch",
    "running",
]
