"""The difference of two networks: the changed lines of their graphs, or of their modules."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any, cast

from torch import fx, nn
from torch.export import ExportedProgram

from fxfact.analysis.inspection import capture_for_display
from fxfact.capture import Captured
from fxfact.conv import ConvLayer, is_conv, read_conv
from fxfact.errors import check_int
from fxfact.utils import PrintsTable, as_json, write_by_suffix

_MARK, _LINE = 2, " │ "  # characters before a text, and between the two networks


@dataclass(frozen=True)
class DiffLine:
    """A line of one network or of both.

    Attributes:
        before: The line of the first network, or "" if it has none.
        after: The line of the second network, or "" if it has none.
        changed: Whether they differ.
    """

    before: str
    after: str
    changed: bool


@dataclass(frozen=True)
class Diff(PrintsTable):
    """The result of ``diff``. ``print`` shows it side by side, in the width of the terminal.

    It is false if the networks are equal.

    Attributes:
        groups: Changed lines with the equal lines around them, one group for every place.
    """

    groups: tuple[tuple[DiffLine, ...], ...]

    def __bool__(self) -> bool:
        return bool(self.groups)

    def _table(self, width: int | None) -> str:
        """The lines side by side, cut off: ``-`` marks those of the first network, ``+`` those of the second."""
        texts = [text for group in self.groups for line in group for text in (line.before, line.after)]
        room = max(map(len, texts), default=0) + _MARK
        if width is not None:
            room = min(room, (width - len(_LINE)) // 2)
        groups = ["\n".join(_side_by_side(line, room) for line in group) for group in self.groups]
        return "\n⋯\n".join(groups)

    def to_json(self) -> dict[str, Any]:
        """Return the lines as plain data.

        Returns:
            Strings, lists and dicts.
        """
        return {"format": "fxfact diff", "version": 1, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the difference to a file.

        Args:
            path: ``NAME.txt`` for the whole text, or ``NAME.json`` for the data.

        Raises:
            ArgumentError: ``path`` has another ending.
            ArgumentTypeError: ``path`` is not a path.
            FileError: The file cannot be written.
        """
        data = {".txt": lambda: f"{self.table()}\n", ".json": lambda: f"{as_json(self.to_json(), indent=1)}\n"}
        write_by_suffix(path, "diff", data)


def diff(before: nn.Module | ExportedProgram, after: nn.Module | ExportedProgram, *, context: int = 2) -> Diff:
    """Compare the graphs of two networks line by line.

    If one of the two has no graph, because it keeps the model's own Python, the modules of both are compared instead.

    Args:
        before: The first network, shown on the left.
        after: The second network, shown on the right.
        context: Number of equal lines to show around every change.

    Returns:
        The changed lines. ``print`` shows them side by side.

    Raises:
        ArgumentError: ``context`` is negative.
        ArgumentTypeError: A network is neither a module nor an ExportedProgram.
        CaptureError: A network cannot be copied.
    """
    context = check_int("context", context, 0)
    networks = [capture_for_display(before), capture_for_display(after)]
    have_graphs = all(isinstance(captured.network, fx.GraphModule) for captured in networks)
    left, right = map(_graph_lines if have_graphs else _module_lines, networks)
    groups = SequenceMatcher(None, left, right, autojunk=False).get_grouped_opcodes(context)
    return Diff(tuple(tuple(_lines(group, left, right)) for group in groups if group))


def _lines(group: list[tuple[str, int, int, int, int]], left: list[str], right: list[str]) -> Iterator[DiffLine]:
    for tag, i, j, k, m in group:
        for one, other in zip_longest(left[i:j], right[k:m], fillvalue=""):
            yield DiffLine(one, other, tag != "equal")


def _side_by_side(line: DiffLine, room: int) -> str:
    marks = ("-", "+") if line.changed else (" ", " ")
    before, after = (_column(text, mark, room) for text, mark in zip((line.before, line.after), marks, strict=True))
    return f"{before}{_LINE}{after}".rstrip()


def _column(text: str, mark: str, room: int) -> str:
    shown = f"{mark if text else ' '} {text}"
    return shown.ljust(room) if len(shown) <= room else f"{shown[: room - 1]}…"


def _module_lines(captured: Captured) -> list[str]:
    """Return one line for every module without children."""
    leaves = [(path, module) for path, module in captured.network.named_modules() if not list(module.children())]
    return [f"{path}: {_module_text(captured, path, module)}" for path, module in leaves]


def _graph_lines(captured: Captured) -> list[str]:
    """Return one line for every node.

    A node that replaced another is called by that node's name, so that the lines of its users do not change.
    """
    graph_module = cast(fx.GraphModule, captured.network)
    names = {node: node.name for node in graph_module.graph.nodes}
    names |= {node: name for name, node in _replacements(graph_module).items()}
    return [_node_line(captured, node, names) for node in graph_module.graph.nodes]


def _replacements(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """Return the last of the nodes with which a pass of fxfact replaced another, by the name of that other."""
    sources = [(node.meta.get("from_node"), node) for node in graph_module.graph.nodes]
    return {source[-1].name: node for source, node in sources if source and source[-1].pass_name.startswith("fxfact")}


def _node_line(captured: Captured, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """Return a line such as ``y = conv(x): Conv2d(…)``; shorter than ``Node.format_node``, and with other names."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    values = [*node.args, *(f"{key}={value}" for key, value in node.kwargs.items())]
    arguments = ", ".join(str(fx.node.map_arg(value, lambda n: names[n])) for value in values).replace("'", "")
    if node.op in ("placeholder", "output"):
        return f"{names[node]}" if node.op == "placeholder" else f"return {arguments}"
    line = f"{names[node]} = {target}({arguments})"
    if node.op != "call_module":
        return line
    path = str(node.target)
    return f"{line}: {_module_text(captured, path, captured.network.get_submodule(path))}"


def _module_text(captured: Captured, path: str, module: nn.Module) -> str:
    """Return a convolution's sizes and whose weight it shares, or the class of another module."""
    layer = read_conv(module) if is_conv(module) else None
    if not isinstance(layer, ConvLayer):
        return type(module).__name__
    shared = next((site.tied_to for site in captured.sites if site.path == path and site.tied_to), None)
    return f"{layer.spec}, the weight of {shared}" if shared else str(layer.spec)
