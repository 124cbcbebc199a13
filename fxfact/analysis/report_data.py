"""What a report holds: values, from which text, JSON and pictures are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from fxfact.conv import Cost, format_change


@dataclass(frozen=True, kw_only=True)
class Block:
    """A convolution, a chain, or another operation, with the operations ``behind`` that nothing but its output enters.

    ``inputs`` are the numbers of the blocks that it reads. ``macs`` are for one sample, None where unknown; ``stages``
    those of a chain, in order.
    """

    kind: str  # 'input', 'convolution', 'chain', 'operation', 'output'
    label: str
    detail: str = ""
    behind: tuple[str, ...] = ()
    inputs: tuple[int, ...] = ()
    macs: int | None = None
    stages: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockDiagram:
    """The blocks of a network in the order in which they run; not ``wired`` where the model keeps its own Python, whose
    modules are in the order of their definition and whose wires are not known.
    """

    blocks: tuple[Block, ...]
    wired: bool

    @property
    def macs(self) -> int:
        """Of all blocks."""
        return sum(block.macs or 0 for block in self.blocks)


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The singular values of an unfolding of a kernel (of groups the root mean squares), over the largest, descending;
    ``rank`` of them are kept.
    """

    name: str
    values: tuple[float, ...]
    rank: int


@dataclass(frozen=True, kw_only=True)
class ConvReport:
    """One convolution, and what became of it; ``reason`` says why nothing did.

    ``before`` and ``after`` are costs for one sample, ``milliseconds`` those of the convolution and of its chain on the
    inputs' sizes, taking turns, ``activation_bytes`` the most that what they make takes at one time, beside the input,
    None where there were no inputs. Errors are relative: of the kernel, and of the output on
    the original's own input. ``predicted_loss_increase`` is by how much the loss was foreseen to grow, in nats.
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
class ReportData:
    """Two networks on some inputs: costs for one sample, milliseconds for the inputs, taking turns, on ``threads``, and
    the most bytes that activations take at one time; errors as ``fxfact.verify`` measures them. ``refused`` says why
    ways of capturing that reach more were not taken.
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
    ok: bool
    convolutions: tuple[ConvReport, ...]
    flows: tuple[BlockDiagram, BlockDiagram]

    def __str__(self) -> str:
        headers = ["path", "convolution", "became", "parameters", "MACs", "ms", "peak MB", "kernel", "output", "remark"]
        rows = [_row(conv) for conv in self.convolutions]
        before, after = self.before, self.after
        pairs = [
            (before.params, after.params),
            (before.macs, after.macs),
            self.milliseconds,
            megabytes(self.activation_bytes),
        ]
        whole = [format_change(*pair) for pair in pairs]
        rows.append(["network", self.model, "", *whole, "", error(self.end_to_end_error), ""])
        table = tabulate(rows, headers, disable_numparse=True, maxcolwidths=[None] * 9 + [50])
        verdict = "right" if self.ok else "WRONG"
        return f"{table}\n\ngraph {self.graph_error:.2e} ({verdict}); {on_threads(self.threads)}; errors are relative"

    def to_json(self) -> dict[str, Any]:
        """Plain data: numbers, strings, lists and dicts."""
        return {"format": "fxfact report", "version": 1, **asdict(self)}


def on_threads(count: int) -> str:
    """So many, in words."""
    return f"{count} thread" if count == 1 else f"{count} threads"


def megabytes(found: tuple[int, int]) -> tuple[float, float]:
    """Of bytes."""
    before, after = found
    return before / 1e6, after / 1e6


def error(found: float | None) -> str:
    """Three digits."""
    return "" if found is None else f"{found:.3g}"


def rank_shown(rank: tuple[int, ...] | None) -> str:
    """The entries, parted by commas."""
    return ",".join(map(str, rank or ()))


def _row(conv: ConvReport) -> list[str]:
    return [
        conv.path,
        conv.convolution,
        f"{conv.factorization} {rank_shown(conv.rank)}".strip() or "-",
        format_change(conv.before.params, conv.after.params) if conv.convolution else "",
        format_change(conv.before.macs, conv.after.macs),
        "" if conv.milliseconds is None else format_change(*conv.milliseconds),
        "" if conv.activation_bytes is None else format_change(*megabytes(conv.activation_bytes)),
        error(conv.kernel_error),
        error(conv.output_error),
        conv.reason or conv.note,
    ]
