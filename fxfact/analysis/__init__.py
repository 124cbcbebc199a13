"""Is a factorized network right, and what changed? Verification, inspection, reports."""

from fxfact.analysis.dot import to_dot
from fxfact.analysis.inspection import diff, inspect
from fxfact.analysis.report_data import on_threads
from fxfact.analysis.reports import Report, report
from fxfact.analysis.verification import Verification, check_rewrite, prepared, stages_of, verify, with_kernels

__all__ = [
    "Report",
    "Verification",
    "check_rewrite",
    "diff",
    "inspect",
    "on_threads",
    "prepared",
    "report",
    "stages_of",
    "to_dot",
    "verify",
    "with_kernels",
]
