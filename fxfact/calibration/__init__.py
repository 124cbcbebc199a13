"""Calibration: turns data into statistics that say which errors the loss of a network tolerates."""

from fxfact.calibration.batches import (
    Batches,
    BatchReader,
    Transform,
    batch_call,
    first_sample,
    iter_batches,
    run_batch,
    split_held_out,
    take_samples,
    with_batch_options,
)
from fxfact.calibration.collect import MAX_SEED, collect_statistics, generator_seed, rank_and_world_size
from fxfact.calibration.divergence import DivergenceEvaluator, mean_and_error, significantly_negative
from fxfact.calibration.moments import Window
from fxfact.calibration.outputs import Likelihood, parse_likelihood
from fxfact.calibration.statistics import Statistics

__all__ = [
    "MAX_SEED",
    "BatchReader",
    "Batches",
    "DivergenceEvaluator",
    "Likelihood",
    "Statistics",
    "Transform",
    "Window",
    "batch_call",
    "collect_statistics",
    "first_sample",
    "generator_seed",
    "iter_batches",
    "mean_and_error",
    "parse_likelihood",
    "rank_and_world_size",
    "run_batch",
    "significantly_negative",
    "split_held_out",
    "take_samples",
    "with_batch_options",
]
