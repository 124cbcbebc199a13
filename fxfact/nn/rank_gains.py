"""Gains of the channels between the stages of a layer, which are its rank indices: dropout and lasso.

Every rank index is one channel (in CP one in each depthwise stage) between two stages. A gain of zero removes it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxfact.errors import ArgumentError, check_int
from fxfact.factorizations import CPFactorized, CPMobilenet
from fxfact.nn.structure import Structure


def rank_stages(structure: Structure) -> dict[int, int]:
    """Return the stages whose output channels are rank indices, with the number of indices of a group.

    The output channels of a depthwise stage are those of its input, so they count once.
    """
    dense, method = structure.spec, structure.factorization
    is_cp = isinstance(method, CPFactorized | CPMobilenet)
    found = {}
    for k, stage in enumerate(structure.stages[:-1]):
        if k == 0 or not (is_cp or stage.groups != dense.groups):
            found[k] = stage.out_channels // dense.groups
    return found


class RankDropout(nn.Module):
    """Draws gains that drop rank indices while training.

    Args:
        p: the probability with which an index is dropped.
        min_dim: a rank up to this size is not dropped from.
        min_values: how many indices are kept at least.
        drop_test: whether indices are dropped in evaluation mode as well, then without a new scale.
    """

    def __init__(self, p: float, min_dim: int, min_values: int, drop_test: bool) -> None:
        super().__init__()
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
            raise ArgumentError(f"the probability of tensor dropout must be at least 0 and below 1, got {p!r}")
        self.p, self.drop_test = float(p), drop_test
        self.min_dim, self.min_values = check_int("min_dim", min_dim, 0), check_int("min_values", min_values, 1)

    def forward(self, size: int, like: Tensor) -> Tensor | None:
        """Return gains of the shape and type of ``like`` (size,), or None if nothing is dropped."""
        if not self.p or size <= self.min_dim or not (self.training or self.drop_test):
            return None
        drawn = torch.rand_like(like)
        least = drawn.topk(min(self.min_values, size)).values[-1]
        kept = (drawn >= self.p) | (drawn >= least)
        return kept.to(like.dtype) / (1 - self.p if self.training else 1)

    def extra_repr(self) -> str:
        """Describe the options in ``repr``."""
        return f"p={self.p}, min_dim={self.min_dim}, min_values={self.min_values}, drop_test={self.drop_test}"


class RankLasso(nn.Module):
    """Holds a trained gain for every rank index. Those that fall to the threshold are zero, and stay so.

    Args:
        sizes: the rank of each group, by the stage.
        like: a tensor of the device and dtype of the gains.
        clamp_weights: whether no gain exceeds 1.
        threshold: the largest value that counts as zero.
    """

    def __init__(self, sizes: Mapping[int, int], like: Tensor, clamp_weights: bool, threshold: float) -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise ArgumentError(f"the threshold of the lasso must be at least 0 and below 1, got {threshold!r}")
        self.clamp_weights, self.threshold = clamp_weights, float(threshold)
        ones = {
            str(k): nn.Parameter(torch.ones(size, dtype=like.dtype, device=like.device)) for k, size in sizes.items()
        }
        self.weights = nn.ParameterDict(ones)

    def forward(self, stage: int) -> Tensor:
        """Return the gains (size,) of a stage."""
        weight: Tensor = self.weights[str(stage)]
        gains = torch.where(weight > self.threshold, weight, torch.zeros_like(weight))
        return gains.clamp_max(1) if self.clamp_weights else gains

    def sum_and_count(self) -> tuple[Tensor, int]:
        """Return the sum of all gains that are not zero, before they are clamped, and the number of all gains."""
        weights: list[Tensor] = list(self.weights.values())
        sums = [torch.where(w > self.threshold, w, torch.zeros_like(w)).sum() for w in weights]
        return torch.stack(sums).sum(), sum(w.numel() for w in weights)

    def extra_repr(self) -> str:
        """Describe the options in ``repr``."""
        return f"clamp_weights={self.clamp_weights}, threshold={self.threshold}"
