"""Calibration: turns data into statistics that say which errors the loss of a network tolerates."""

from fxfact.calibration.batch_options import MAX_SAMPLES, with_batch_options, with_example
from fxfact.calibration.batches import (
    Batches,
    BatchReader,
    Transform,
    batch_call,
    cut_batch,
    first_batch,
    iter_batches,
    run_batch,
    split_held_out,
    take_samples,
)
from fxfact.calibration.collect import (
    MAX_SEED,
    collect_statistics,
    generator_seed,
)
from fxfact.calibration.divergence import DivergenceEvaluator, mean_and_error, significantly_negative
from fxfact.calibration.likelihood import (
    CustomLoss,
    Likelihood,
    own_likelihood,
    parts_of,
    resolve_likelihood,
)
from fxfact.calibration.moments import Window
from fxfact.calibration.output_parts import OutputPart
from fxfact.calibration.output_samples import READING_SAMPLES
from fxfact.calibration.processes import gather_objects, rank_and_world_size, samples_of_all_processes
from fxfact.calibration.statistics import Statistics

__all__ = [
    "MAX_SAMPLES",
    "MAX_SEED",
    "READING_SAMPLES",
    "BatchReader",
    "Batches",
    "CustomLoss",
    "DivergenceEvaluator",
    "Likelihood",
    "OutputPart",
    "Statistics",
    "Transform",
    "Window",
    "batch_call",
    "collect_statistics",
    "cut_batch",
    "first_batch",
    "gather_objects",
    "generator_seed",
    "iter_batches",
    "mean_and_error",
    "own_likelihood",
    "parts_of",
    "rank_and_world_size",
    "resolve_likelihood",
    "run_batch",
    "samples_of_all_processes",
    "significantly_negative",
    "split_held_out",
    "take_samples",
    "with_batch_options",
    "with_example",
]
