"""Plans that must be measured: on data (a loss), by the clock (milliseconds). Propose a plan, measure it, decide."""

from fxfact.search.inference import fall_back_if_slower, for_inference, warn_if_slower
from fxfact.search.search import CalibrationData, SearchResult, search

__all__ = ["CalibrationData", "SearchResult", "fall_back_if_slower", "for_inference", "search", "warn_if_slower"]
