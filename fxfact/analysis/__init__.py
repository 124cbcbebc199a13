"""Verification, inspection and reports of factorized networks."""

from fxfact.analysis.dot import to_dot
from fxfact.analysis.graph_diff import Diff, diff
from fxfact.analysis.inspection import inspect
from fxfact.analysis.reference import prepare_original, stages_of, update_kernel_errors
from fxfact.analysis.report_data import format_threads
from fxfact.analysis.reports import Report, report
from fxfact.analysis.verification import Verification, check_rewrite, verify

__all__ = [
    "Diff",
    "Report",
    "Verification",
    "check_rewrite",
    "diff",
    "format_threads",
    "inspect",
    "prepare_original",
    "report",
    "stages_of",
    "to_dot",
    "update_kernel_errors",
    "verify",
]
