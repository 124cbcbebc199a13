"""Helpers without knowledge of convolutions: timing, progress, executors, copies, files, precision."""

from fxfact.utils.activation_memory import peak_bytes
from fxfact.utils.atomic_write import as_json, atomic_write, check_path, write_by_suffix
from fxfact.utils.compare import (
    difference,
    map_tensors,
    named_tensors,
    plain_tensors_of,
    relative_error,
    tensors_of,
    tolerance_for,
)
from fxfact.utils.digest import tensor_digest
from fxfact.utils.executor import check_executor, ordered_map, processes
from fxfact.utils.finite_state import check_finite_state
from fxfact.utils.model_copy import (
    alias_copy,
    copy_structure,
    copy_with_shared,
    dequantize_parameters,
    get_metadata,
    set_metadata,
    to_eval,
)
from fxfact.utils.precision import full_precision, no_reduced_precision
from fxfact.utils.progress import Progress, check_progress, with_phase, with_progress
from fxfact.utils.pt2_reproducible import reproducible_archive
from fxfact.utils.pt2_safety import check_harmless, check_loadable, explain_refused, refused_classes
from fxfact.utils.storage import StorageIndex, is_distributed, is_wrapper, plain_tensors, storages_of
from fxfact.utils.table import Cell, Column, Table, terminal_width, wrap_lines
from fxfact.utils.timing import (
    CLOCK_RESOLUTION_MS,
    Timer,
    as_timing_errors,
    milliseconds,
    milliseconds_of_graphs,
    seeded_randn,
    side_by_side,
    summarize_turns,
)
from fxfact.utils.warn import warn_caller

__all__ = [
    "CLOCK_RESOLUTION_MS",
    "Cell",
    "Column",
    "Progress",
    "StorageIndex",
    "Table",
    "Timer",
    "alias_copy",
    "as_json",
    "as_timing_errors",
    "atomic_write",
    "check_executor",
    "check_finite_state",
    "check_harmless",
    "check_loadable",
    "check_path",
    "check_progress",
    "copy_structure",
    "copy_with_shared",
    "dequantize_parameters",
    "difference",
    "explain_refused",
    "full_precision",
    "get_metadata",
    "is_distributed",
    "is_wrapper",
    "map_tensors",
    "milliseconds",
    "milliseconds_of_graphs",
    "named_tensors",
    "no_reduced_precision",
    "ordered_map",
    "peak_bytes",
    "plain_tensors",
    "plain_tensors_of",
    "processes",
    "refused_classes",
    "relative_error",
    "reproducible_archive",
    "seeded_randn",
    "set_metadata",
    "side_by_side",
    "storages_of",
    "summarize_turns",
    "tensor_digest",
    "tensors_of",
    "terminal_width",
    "to_eval",
    "tolerance_for",
    "warn_caller",
    "with_phase",
    "with_progress",
    "wrap_lines",
    "write_by_suffix",
]
