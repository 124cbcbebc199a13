"""What an error of a kernel costs: second moments that weigh it, and the fit of a chain that makes the cost least."""

from fxfact.metric.base import Metric, Moment, as_matrix, root
from fxfact.metric.fitting import fit, in_channel_metric

__all__ = ["Metric", "Moment", "as_matrix", "fit", "in_channel_metric", "root"]
