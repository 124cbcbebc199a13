"""A factorized network beside its original, shown: as text, as JSON, as a page with pictures, as Graphviz source."""

from fxfact.reporting.base import Block, ConvReport, Flow, Spectrum, on_threads
from fxfact.reporting.dot import to_dot
from fxfact.reporting.making import Report, report

__all__ = ["Block", "ConvReport", "Flow", "Report", "Spectrum", "on_threads", "report", "to_dot"]
