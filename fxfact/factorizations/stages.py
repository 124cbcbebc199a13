"""The shapes of factorizations: their ranks, and the stages of the chain for each rank."""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Integral
from typing import ClassVar, TypeVar, final

from fxfact.conv import ConvSpec, Sizes, Skip, chain_cost
from fxfact.errors import RankError, RefusedError

Rank = tuple[int, ...]
T = TypeVar("T")
_LEAST_SAVING = 0.05  # of the parameters, for a factorization that restricts another to be tried beside it


def format_rank(rank: Rank | None) -> str:
    """Write a rank as short text.

    Args:
        rank: a rank, or None or an empty one for a layer that stays dense.

    Returns:
        "8", "(8,9)", or "" for a layer that stays dense.
    """
    return "" if not rank else str(rank[0]) if len(rank) == 1 else str(rank).replace(" ", "")


class ChainLayout(ABC):
    """The part of ``Factorization`` that needs no weights."""

    name: ClassVar[str]
    factorizes_linear: ClassVar[bool] = False
    restricts: ClassVar[str] = ""
    is_fitted: ClassVar[bool] = True

    @abstractmethod
    def _rejects(self, block: ConvSpec) -> str | None:
        """Return why this convolution cannot be factorized, or None if it can be."""

    @abstractmethod
    def _max_rank(self, block: ConvSpec) -> Rank:
        """Return the largest useful value of every entry of the rank. ``_rejects`` has returned None."""

    @abstractmethod
    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        """Return the stages of the chain, all without bias, for a feasible rank."""

    def _feasible_rank(self, block: ConvSpec, rank: Rank) -> Rank:
        """Return a rank, which is within ``_max_rank``, lowered if its entries bound each other."""
        return rank

    def _shared_stages(self, block: ConvSpec, rank: Rank) -> Sequence[int]:
        """Return the indices of the stages that the layers of a joint set share: all stages but one, or none."""
        return ()

    def _tensorly_rank(self, block: ConvSpec, fraction: float) -> Rank:
        """Return TensorLy's rank for a fraction of the parameters. Here ``block`` has the bias of the convolution."""
        return self.rank_within(block, fraction) or self.smallest_rank(block)

    @final
    def rejects(self, spec: ConvSpec) -> Skip | None:
        """Say whether a convolution cannot be factorized this way.

        Args:
            spec: the convolution.

        Returns:
            The reason, or None if it can be factorized.
        """
        reason = self._reason(one_group(spec))
        return Skip(reason) if reason else None

    @final
    def max_rank(self, spec: ConvSpec) -> Rank:
        """Return the largest useful rank.

        Args:
            spec: the convolution.

        Returns:
            The rank of each group. At this rank the chain can equal the convolution.

        Raises:
            RefusedError: if ``rejects`` returns a reason.
        """
        return self._checked_max_rank(spec, one_group(spec))

    @final
    def is_worth_trying(self, spec: ConvSpec, others: Sequence[ChainLayout]) -> bool:
        """Say whether the chains for a convolution are clearly smaller than those of the factorization it restricts.

        Args:
            spec: the convolution.
            others: the factorizations that are tried as well.

        Returns:
            False if one of them is named by ``restricts``, and has at most five per cent more parameters at rank 1.

        Raises:
            RefusedError: if ``rejects`` returns a reason.
        """

        def params(layout: ChainLayout) -> int:
            return chain_cost(layout.layout(spec, layout.smallest_rank(spec)), None).params

        general = [other for other in others if other.name == self.restricts and not other.rejects(spec)]
        return not any(params(self) > (1 - _LEAST_SAVING) * params(other) for other in general)

    @final
    def smallest_rank(self, spec: ConvSpec) -> Rank:
        """Return the rank whose entries are all 1.

        Args:
            spec: the convolution.

        Returns:
            The rank of each group.

        Raises:
            RefusedError: if ``rejects`` returns a reason.
        """
        return (1,) * len(self.max_rank(spec))

    @final
    def clip(self, spec: ConvSpec, rank: Rank) -> Rank:
        """Lower a rank to a feasible one.

        Args:
            spec: the convolution.
            rank: the rank of each group. Its entries may be too large.

        Returns:
            The largest feasible rank whose entries do not exceed those of ``rank``.

        Raises:
            RefusedError: if ``rejects`` returns a reason.
            RankError: if ``rank`` has another number of entries than the factorization.
        """
        block = one_group(spec)
        most = self._checked_max_rank(spec, block)
        self._check_entries(spec, most, rank)
        return self._feasible_rank(block, tuple(min(r, m) for r, m in zip(rank, most, strict=True)))

    @final
    def layout(self, spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        """Return the stages of the chain that ``decompose`` makes.

        Args:
            spec: the convolution.
            rank: the rank of each group.

        Returns:
            The stages in order. Only the last one has a bias, if the convolution has one.

        Raises:
            RefusedError: if ``rejects`` returns a reason.
            RankError: if the convolution cannot have this rank.
        """
        return self.layouts(spec, (rank,))[0]

    @final
    def layouts(self, spec: ConvSpec, ranks: Sequence[Rank]) -> list[tuple[ConvSpec, ...]]:
        """Return ``layout`` for several ranks, which is faster than a call for each.

        Args:
            spec: the convolution.
            ranks: the ranks of each group.

        Returns:
            The stages for each of the ranks.

        Raises:
            RefusedError: if ``rejects`` returns a reason.
            RankError: if the convolution cannot have one of the ranks.
        """
        block = one_group(spec)
        most = self._checked_max_rank(spec, block)
        return [self._checked_stages(spec, block, most, rank) for rank in ranks]

    @final
    def unbounded_layout(self, spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        """Return the stages for a rank that may be larger than this convolution can use.

        Factors that several convolutions share can have such a rank.

        Args:
            spec: the convolution, without groups.
            rank: the rank.

        Returns:
            The stages in order. Only the last one has a bias, if the convolution has one.
        """
        stages = tuple(self._stages(one_group(spec), rank))
        return (*stages[:-1], replace(stages[-1], bias=spec.bias))

    @final
    def shared_stages(self, spec: ConvSpec, rank: Rank) -> tuple[int, ...]:
        """Return which stages the convolutions of a joint set share, if this is the spec of one of them.

        Args:
            spec: the convolution.
            rank: the rank.

        Returns:
            The indices of the stages: all but one, or none if the factorization shares none, if there is one stage
            only, and for convolutions with groups and transposed ones.
        """
        if spec.groups > 1 or (spec.transposed and spec.order):
            return ()
        return tuple(self._shared_stages(one_group(spec), rank))

    @final
    def shared_params(self, spec: ConvSpec, rank: Rank) -> int:
        """Return how many parameters the ``shared_stages`` have.

        Args:
            spec: the convolution.
            rank: the rank.

        Returns:
            The number of elements of their weights.

        Raises:
            RefusedError, RankError: as ``layout``.
        """
        stages = self.layout(spec, rank)
        return sum(math.prod(stages[k].weight_shape) for k in self.shared_stages(spec, rank))

    @final
    def ranks(self, spec: ConvSpec) -> tuple[Rank, ...]:
        """Return the ranks to choose from: all that are proportional to the largest one.

        Args:
            spec: the convolution.

        Returns:
            The ranks, ascending, with entries rounded down to at least 1. If the largest rank has only one stage, which
            is the convolution itself, it is left out.

        Raises:
            RefusedError: if ``rejects`` returns a reason.
        """
        block = one_group(spec)
        return self._proportional_ranks(block, self._checked_max_rank(spec, block))

    @final
    def ranks_within(self, spec: ConvSpec, fraction: float) -> tuple[Rank, ...]:
        """Return those of ``ranks`` whose chains have at most a fraction of the convolution's parameters.

        Args:
            spec: the convolution.
            fraction: the fraction. The bias counts as well.

        Returns:
            The ranks, ascending. Empty if even the smallest one has more parameters.

        Raises:
            RefusedError: if ``rejects`` returns a reason.
        """
        block = one_group(spec)
        most = self._checked_max_rank(spec, block)
        ranks = self._proportional_ranks(block, most)

        def params(rank: Rank) -> int:
            return chain_cost(self._checked_stages(spec, block, most, rank), None).params

        return ranks[: bisect.bisect_right(ranks, fraction * spec.params, key=params)]

    @final
    def rank_within(self, spec: ConvSpec, fraction: float) -> Rank | None:
        """Return the largest of ``ranks_within``.

        Args:
            spec: the convolution.
            fraction: the fraction of the parameters.

        Returns:
            The rank, or None if even the smallest one has more parameters.

        Raises:
            RefusedError: if ``rejects`` returns a reason.
        """
        ranks = self.ranks_within(spec, fraction)
        return ranks[-1] if ranks else None

    @final
    def tensorly_rank(self, spec: ConvSpec, fraction: float) -> Rank:
        """Return the rank that TensorLy's rule gives for a fraction of the parameters.

        Args:
            spec: the convolution.
            fraction: the fraction of the parameters.

        Returns:
            The rank, clipped to a feasible one. If TensorLy has no rule, ``rank_within`` or the smallest rank.

        Raises:
            RefusedError: if ``rejects`` returns a reason.
        """
        self.max_rank(spec)
        return self.clip(spec, tuple(max(1, r) for r in self._tensorly_rank(spec.block, fraction)))

    @final
    def _reason(self, block: ConvSpec) -> str | None:
        """Return why a convolution or linear layer cannot be factorized, or None if it can be."""
        if not (block.order or self.factorizes_linear):
            return "the weight of a linear layer is a matrix: use svd"
        return self._rejects(block)

    @final
    def _checked_max_rank(self, spec: ConvSpec, block: ConvSpec) -> Rank:
        if reason := self._reason(block):
            raise RefusedError(f"{reason} ({spec})")
        return self._max_rank(block)

    @final
    def _proportional_ranks(self, block: ConvSpec, most: Rank) -> tuple[Rank, ...]:
        steps = sorted({(j / n, j, n) for n in set(most) for j in range(1, n + 1)})
        proportional = dict.fromkeys(tuple(max(1, j * m // n) for m in most) for _, j, n in steps)
        distinct = list(dict.fromkeys(self._feasible_rank(block, rank) for rank in proportional))
        if len(distinct) > 1 and len(self._stages(block, distinct[-1])) == 1:
            distinct.pop()
        return tuple(distinct)

    @final
    def _check_entries(self, spec: ConvSpec, most: Rank, rank: Rank) -> None:
        integers = isinstance(rank, tuple) and all(isinstance(entry, Integral) for entry in rank)
        if not integers or len(rank) != len(most):
            raise RankError(f"{self.name} has {len(most)} ranks on {spec}. Pass a tuple of integers, got {rank!r}.")

    @final
    def _checked_stages(self, spec: ConvSpec, block: ConvSpec, most: Rank, rank: Rank) -> tuple[ConvSpec, ...]:
        self._check_entries(spec, most, rank)
        if min(rank) < 1 or any(r > m for r, m in zip(rank, most, strict=True)):
            raise RankError(
                f"{self.name} rank must be within {format_rank((1,) * len(most))} and {format_rank(most)} on {spec}, "
                f"got {format_rank(rank)}. Pass a smaller rank, or a fraction of the parameters."
            )
        if (feasible := self._feasible_rank(block, rank)) != rank:
            raise RankError(
                f"{self.name} ranks bound each other: on {spec}, {rank} can be {feasible} at most. Pass a smaller rank."
            )
        stages = tuple(self._stages(block, rank))
        if spec.groups > 1:
            stages = tuple(_all_groups(stage, spec.groups) for stage in stages)
        return (*stages[:-1], replace(stages[-1], bias=True)) if spec.bias else stages


def one_group(spec: ConvSpec) -> ConvSpec:
    """Return the convolution of one group, without bias: the ``block`` that hooks get."""
    if spec.groups == 1 and not spec.bias:
        return spec
    ins, outs = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    return replace(spec, in_channels=ins, out_channels=outs, groups=1, bias=False)


def _all_groups(stage: ConvSpec, groups: int) -> ConvSpec:
    ins, outs = stage.in_channels * groups, stage.out_channels * groups
    return replace(stage, in_channels=ins, out_channels=outs, groups=stage.groups * groups)


def why_no_channel_modes(block: ConvSpec) -> str | None:
    """Return why a decomposition over channels and kernel positions does not apply, or None if it applies."""
    if set(block.kernel_size) == {1}:
        return "a 1×1 kernel is a matrix: use svd"
    if block.in_channels == block.out_channels == 1:
        return "a depthwise kernel maps one channel to one and has no channel modes: try spatial_svd"
    return None


def pointwise(block: ConvSpec, in_channels: int, out_channels: int) -> ConvSpec:
    """Return a pointwise stage, which keeps the spatial size.

    Args:
        block: a convolution with the same number of spatial axes.
        in_channels: the input channels of the stage.
        out_channels: the output channels of the stage.

    Returns:
        A 1×1 convolution with the axes of ``block`` or a linear layer, with stride 1, without padding and bias.
    """
    order = len(block.kernel_size)
    ones = (1,) * order
    return ConvSpec(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=ones,
        stride=ones,
        padding=((0, 0),) * order,
        dilation=ones,
    )


def stages_along(
    block: ConvSpec, axes: Sequence[Sizes], channels: Sequence[int], *, depthwise: bool = False
) -> tuple[ConvSpec, ...]:
    """Return a chain of stages, each along some of the spatial axes of a convolution.

    Args:
        block: the convolution. A stage has the kernel size, stride, padding and dilation of ``block`` on its own axes,
            and does nothing on the others.
        axes: the axes of each stage. A stage without axes is pointwise.
        channels: the channels before the first stage, between the stages, and after the last: one more than stages.
        depthwise: whether the stages that are not pointwise are depthwise.

    Returns:
        One stage for each entry of ``axes``.
    """
    return tuple(
        _along(block, own, before, after, groups=before if depthwise else 1) if own else pointwise(block, before, after)
        for own, (before, after) in zip(axes, pairwise(channels), strict=True)
    )


def _along(block: ConvSpec, axes: Sizes, in_channels: int, out_channels: int, *, groups: int) -> ConvSpec:
    def on_axes(values: Sequence[T], neutral: T) -> tuple[T, ...]:
        return tuple(value if axis in axes else neutral for axis, value in enumerate(values))

    padding = on_axes(block.padding, (0, 0))
    return replace(
        block,
        in_channels=in_channels,
        out_channels=out_channels,
        groups=groups,
        kernel_size=on_axes(block.kernel_size, 1),
        stride=on_axes(block.stride, 1),
        padding=padding,
        padding_mode=block.padding_mode if any(map(any, padding)) else "zeros",
        dilation=on_axes(block.dilation, 1),
        output_padding=on_axes(block.output_padding, 0),
    )


def split_axes(block: ConvSpec) -> tuple[Sizes, ...]:
    """Return the axes of each stage if every axis with a kernel size above 1 gets a stage of its own.

    An axis of kernel size 1 joins the next such stage, or the last one.
    """
    stages: list[Sizes] = []
    pending: Sizes = ()
    for axis, size in enumerate(block.kernel_size):
        pending = (*pending, axis)
        if size > 1:
            stages, pending = [*stages, pending], ()
    return (*stages[:-1], stages[-1] + pending) if stages else ()
