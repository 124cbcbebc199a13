"""The data of a report, from which text, JSON and pictures are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fxfact.conv import Cost, format_change_forms, format_spec_forms
from fxfact.factorizations import format_rank
from fxfact.planning import ParetoFront
from fxfact.utils import Cell, Column, PrintsTable, Table, wrap_lines

Change = tuple[float | None, float | None]
"""A number before and after."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One box of a block diagram: a convolution, a chain of convolutions, or another operation.

    Attributes:
        kind: 'input', 'convolution', 'chain', 'operation' or 'output'.
        label: Name of the module, node or convolution.
        detail: More about it, such as the convolution's sizes or the chain's rank.
        followed_by: Operations drawn in the same box, because they alone read its output and nothing else.
        inputs: Indices of the blocks that it reads.
        macs: MACs for one sample, or None if unknown.
        stages: The convolutions of a chain, in order.
    """

    kind: str
    label: str
    detail: str = ""
    followed_by: tuple[str, ...] = ()
    inputs: tuple[int, ...] = ()
    macs: int | None = None
    stages: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockDiagram:
    """The blocks of a network.

    Attributes:
        blocks: The blocks in the order of execution, or of definition if there are no edges.
        has_edges: Whether the blocks' inputs are known. They are not if the network keeps the model's own Python.
    """

    blocks: tuple[Block, ...]
    has_edges: bool

    @property
    def macs(self) -> int:
        """The MACs of all blocks, for one sample."""
        return sum(block.macs or 0 for block in self.blocks)


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The singular values of one unfolding of a kernel.

    Attributes:
        name: Shape of the unfolding, such as '64×576'.
        values: Singular values divided by the largest, descending; of a grouped convolution the root mean square over
            the groups.
        rank: How many of them the factorization keeps.
    """

    name: str
    values: tuple[float, ...]
    rank: int


@dataclass(frozen=True, kw_only=True)
class ConvReport:
    """One convolution and its replacement. Every error is relative.

    Attributes:
        path: Name of the convolution.
        convolution: Its sizes as text.
        factorization: Name of the factorization, or '' if the convolution was left dense.
        rank: The factorization's rank.
        stages: The convolutions of the chain as text.
        before: Cost of the convolution for one sample.
        after: Cost of its replacement for one sample.
        milliseconds: Times of convolution and chain on random inputs of the example inputs' sizes, taking turns, or
            None if the sizes are unknown.
        activation_bytes: Peak memory of the activations of convolution and chain, without their input, or None if the
            sizes are unknown.
        kernel_error: Error of the composed kernel.
        output_error: Error of the output on the input that the convolution gets in the original.
        predicted_loss_increase: Increase of the loss that the plan predicted, before any refitting or training, in nats
            per sample (1 nat of KL divergence is log₂ e = 1.44 bits).
        reason: Why the convolution was left dense.
        note: What it shares with other layers, and a remark on the rank.
        spectra: Singular values of the unfoldings that the ranks belong to.
    """

    path: str
    convolution: str
    factorization: str = ""
    rank: tuple[int, ...] = ()
    stages: tuple[str, ...] = ()
    before: Cost
    after: Cost
    milliseconds: tuple[float, float] | None = None
    activation_bytes: tuple[int, int] | None = None
    kernel_error: float | None = None
    output_error: float | None = None
    predicted_loss_increase: float | None = None
    reason: str = ""
    note: str = ""
    spectra: tuple[Spectrum, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReportData(PrintsTable):
    """Two networks compared on some inputs.

    Attributes:
        model: Class name of the original.
        capture: How it was captured: 'trace', 'modules' or 'export'.
        refused: Why other ways of capture were not taken.
        before: Cost of the original for one sample.
        after: Cost of the factorized network for one sample.
        milliseconds: Times of both networks on the inputs, taking turns.
        activation_bytes: Peak memory of the activations of both networks, without the inputs.
        threads: Threads that PyTorch used for the times.
        graph_error: ``Verification.graph``.
        end_to_end_error: ``Verification.end_to_end``.
        tolerance: ``Verification.tolerance``.
        changed: ``Verification.changed``.
        overflow: ``Verification.overflow``.
        loss_increase: ``Verification.loss_increase``.
        predicted_loss_increase: What the plan predicted, in nats per sample, or None if it was made without data.
        measured_loss_increase: What was measured on the data of the plan, in nats per sample, or None.
        pareto_front: The networks that other budgets would have given, or None if the plan has no budget.
        ok: ``Verification.ok``: whether the graph is correct. It says nothing about the approximation error.
        convolutions: One entry for every convolution and linear layer of the original.
        diagrams: Block diagrams of both networks.
        call: The call that made the plan.
        versions: The versions of fxfact and PyTorch that made the plan.
        created: When the report was made, in UTC.
    """

    model: str
    capture: str
    refused: tuple[str, ...]
    before: Cost
    after: Cost
    milliseconds: tuple[float, float]
    activation_bytes: tuple[int, int]
    threads: int
    graph_error: float
    end_to_end_error: float
    tolerance: float
    changed: tuple[str, ...]
    overflow: str | None
    loss_increase: float | None
    ok: bool
    convolutions: tuple[ConvReport, ...]
    diagrams: tuple[BlockDiagram, BlockDiagram]
    predicted_loss_increase: float | None
    measured_loss_increase: float | None
    pareto_front: ParetoFront | None
    call: str
    versions: Mapping[str, str]
    created: str

    def _table(self, width: int | None) -> str:
        """The layers as a table, with the errors of the network above it and the check below it."""
        columns = [
            Column("path", 0, least=16),
            Column("convolution", 9),
            Column("became", 1),
            Column(("parameters", "params"), 5),
            Column("MACs", 3),
            Column("ms", 2),
            Column("peak MB", 6),
            Column("kernel", 7),
            Column("output", 4),
            Column("remark", 8, least=24, wrap=True),
        ]
        changes = [format_change_forms(old, new) for old, new in cost_changes(self).values()]
        total: list[Cell] = ["network", self.model, "", *changes, "", format_error(self.end_to_end_error), ""]
        rows: list[list[Cell]] = [*map(_table_row, self.convolutions), total]
        above = f"{format_approximation_error(self.end_to_end_error)}{format_loss(self.loss_increase)}"
        below = (
            f"{format_graph_check(self.graph_error, self.tolerance, self.changed, self.overflow)}\n"
            f"ms: {format_threads(self.threads)}; peak MB: activations; kernel, output: relative errors"
        )
        table = Table(columns, rows, has_total=True).format(width)
        return f"{wrap_lines(above, width)}\n\n{table}\n\n{wrap_lines(below, width)}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data: numbers, strings, lists and dicts."""
        return {"format": "fxfact report", "version": 1, **asdict(self)}


def format_loss(increase: float | None) -> str:
    """Say by how much the loss grows on the example inputs, on a line of its own, or "" if that is not known."""
    return "" if increase is None else f"\nloss increase on these inputs: {increase:.3g} nats per sample"


def format_approximation_error(error: float) -> str:
    """Say what the factorization costs on the example inputs."""
    percent = 100 * error
    if not math.isfinite(error):
        return "approximation error unknown: on these inputs, the outputs differ in shape, or in NaN or Inf"
    amount = f"{percent:.0f}" if percent >= 10 else f"{percent:.2g}"
    return f"approximation error {amount} %: relative error of the output against the original, on these inputs"


def format_graph_check(error: float, tolerance: float, changed: Sequence[str], overflow: str | None = None) -> str:
    """Say what was verified on the example inputs, with what result."""
    check = f"(relative error {error:.2e}, tolerance {tolerance:.0e}{', in single precision' if overflow else ''})"
    if overflow and math.isnan(error):
        result = "graph check not possible: the networks cannot be run in single precision"
    elif error <= tolerance:
        result = f"graph check passed: on these inputs, the network equals the original with the same kernels {check}"
    else:
        result = (
            f"graph check FAILED: on these inputs, the network differs from the original with the same kernels {check}"
        )
    lines = [f"OVERFLOW: {format_overflow(overflow)}", result] if overflow else [result]
    if changed:
        names = ", ".join(changed)
        lines.append(f"changed after factorization, and for this check taken from the factorized network: {names}")
    return "\n".join(lines)


def format_overflow(stage: str) -> str:
    """Say which stage overflows, and what to do about it."""
    return (
        f"the output of {stage} overflows on these inputs, while the output of the original is finite. Convert the "
        f"network to bfloat16 or float32, or keep this convolution dense with exclude={stage.rpartition('.')[0]!r}."
    )


def format_threads(count: int) -> str:
    """Return '1 thread', '2 threads' and so on."""
    return f"{count} thread" if count == 1 else f"{count} threads"


def to_megabytes(byte_counts: tuple[int, int]) -> tuple[float, float]:
    """Convert a pair of bytes to megabytes."""
    before, after = byte_counts
    return before / 1e6, after / 1e6


def format_error(value: float | None) -> str:
    """Return an error with three digits, or '' if it is unknown."""
    return "" if value is None else f"{value:.3g}"


def _table_row(conv: ConvReport) -> list[Cell]:
    params, *changes = [format_change_forms(old, new) for old, new in cost_changes(conv).values()]
    return [
        conv.path,
        format_spec_forms(conv.convolution),
        f"{conv.factorization} {format_rank(conv.rank)}".strip() or "-",
        params if conv.convolution else "",
        *changes,
        format_error(conv.kernel_error),
        format_error(conv.output_error),
        conv.reason or conv.note,
    ]


def cost_changes(data: ConvReport | ReportData) -> dict[str, Change]:
    """Return every cost before and after, by its name in tables. Those of one pair are None if they are not known."""
    return {
        "parameters": (data.before.params, data.after.params),
        "MACs": (data.before.macs, data.after.macs),
        "ms": data.milliseconds or (None, None),
        "peak MB": (None, None) if data.activation_bytes is None else to_megabytes(data.activation_bytes),
    }
