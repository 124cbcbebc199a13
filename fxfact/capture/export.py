"""The front end 'export': captures an exported program, and exports the rewritten program again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_unflatten

from fxfact.capture.base import Arguments, Captured, ExampleInputs, arguments_of, copy_arguments, reason_of, samples_of
from fxfact.capture.trace_checks import check_parameters
from fxfact.errors import CaptureError
from fxfact.graph import checked_match, fold_computed_weights, record_macs, record_shapes
from fxfact.utils import alias_copy


def capture_exported(
    program: ExportedProgram, example_inputs: ExampleInputs | None = None, *, fold_weights: bool = False
) -> Captured:
    """Capture an exported program.

    Args:
        program: the program.
        example_inputs: what to count sizes and MACs on. Default: what the program was exported with.
        fold_weights: whether to fold weights that the graph computes from parameters.

    Raises:
        ParameterChangedError: if the program changes a parameter.
        CaptureError: if the program has lost its example inputs, or does not run on others.
    """
    graph_module = alias_copy(program.module(check_guards=False))
    assert isinstance(graph_module, fx.GraphModule)
    check_parameters(graph_module.graph, graph_module)
    if fold_weights:
        fold_computed_weights(graph_module)
    graph_module.recompile()
    if example_inputs is None:
        inputs = inputs_of(program)
    else:
        inputs = Arguments(*arguments_of(example_inputs))
        _record_inputs(graph_module, program, inputs)
    found = checked_match(graph_module, "after the capture of an ExportedProgram")
    samples = samples_of(inputs, found.sites)
    return Captured(
        frontend="export",
        model=_class_name(program),
        network=graph_module,
        found=found.found,
        macs=_count_macs(graph_module, inputs, samples),
        samples=samples,
        program=program,
        example_inputs=inputs,
        fold_weights=fold_weights,
    )


def _class_name(program: ExportedProgram) -> str:
    """Return the class of the module that was exported, or of the program if its nodes do not tell."""
    stacks = (node.meta.get("nn_module_stack") for node in program.graph.nodes)
    _, kind = next((next(iter(stack.values())) for stack in stacks if stack), ("", type(program)))
    return str(kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def _record_inputs(graph_module: fx.GraphModule, program: ExportedProgram, inputs: Arguments) -> None:
    """Record the shapes that all nodes have on these inputs, in place of those of the export. Raises CaptureError."""
    _, expected = program.call_spec.in_spec.children()
    names = expected.context if expected.type is dict else []
    flat = tree_leaves((inputs.args, {name: inputs.kwargs[name] for name in names if name in inputs.kwargs}))
    if len(flat) != program.call_spec.in_spec.num_leaves or set(names) != set(inputs.kwargs):
        raise CaptureError(
            f"example_inputs hold {len(flat)} values, and the ExportedProgram takes "
            f"{program.call_spec.in_spec.num_leaves}. Pass inputs as it was exported with, or none."
        )
    record_shapes(graph_module, flat)
    for node in graph_module.graph.nodes:
        node.meta.pop("val", None)


def reexport(program: ExportedProgram, graph_module: fx.GraphModule) -> ExportedProgram:
    """Export a rewritten ``program.module()`` with the dynamic shapes and output names of the program.

    Args:
        program: the original program.
        graph_module: its rewritten module.

    Raises:
        CaptureError: if ``torch.export.export`` fails.
    """
    args, kwargs = copy_arguments(inputs_of(program))  # a view would be saved with all data that it is a part of
    shapes = _dynamic_shapes(program)
    try:
        exported = torch.export.export(graph_module, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise CaptureError(f"the rewritten program cannot be exported again: {reason_of(error)}") from error
    _name_outputs(exported, program.graph_signature.user_outputs)
    return exported


def _name_outputs(program: ExportedProgram, names: Sequence[Any]) -> None:
    """Give the output nodes these names. Other nodes that have such a name get a new one."""
    signature = program.graph_signature
    for name, now in zip(names, signature.user_outputs, strict=True):
        nodes = {node.name: node for node in program.graph.nodes}
        if name == now or not (isinstance(name, str) and now in nodes):
            continue
        free = next(new for k in count() if (new := f"{name}_stage_{k}") not in nodes)
        for old, new in ((name, free), (now, name)):
            if old in nodes:
                nodes[old].name = new
                signature.replace_all_uses(old, new)
    program.graph_module.recompile()


def _count_macs(graph_module: fx.GraphModule, inputs: Arguments, samples: int) -> int | None:
    """Return the MACs of one sample, or None if the network does not run on fake tensors."""
    try:
        return record_macs(graph_module, *inputs) // samples
    except Exception:
        return None


def inputs_of(program: ExportedProgram) -> Arguments:
    """Return the inputs that the program was exported with. Raises CaptureError if it has lost them."""
    if program.example_inputs is None:
        raise CaptureError("the ExportedProgram has no example_inputs to run it on. Set program.example_inputs.")
    args, kwargs = program.example_inputs
    return Arguments(tuple(args), dict(kwargs))


def _dynamic_shapes(program: ExportedProgram) -> Any:
    """Return the ``dynamic_shapes`` that keep the same sizes symbolic, with the same ranges."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = [
        spec.arg.name if hasattr(spec.arg, "name") else None
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT
    ]
    dims: dict[str, Any] = {}
    specs = [_dims_of(values.get(name or ""), program.range_constraints, dims) for name in names]
    args, kwargs = tree_unflatten(specs, program.call_spec.in_spec)
    return (*args, *kwargs.values()) if kwargs else tuple(args)


def _dims_of(value: Any, ranges: Mapping[Any, Any], dims: dict[str, Any]) -> Any:
    if isinstance(value, torch.SymInt):
        return Dim.DYNAMIC
    if not isinstance(value, Tensor):
        return None
    return {axis: _dim(size, ranges, dims) for axis, size in enumerate(value.shape) if not isinstance(size, int)}


def _dim(size: Any, ranges: Mapping[Any, Any], dims: dict[str, Any]) -> Any:
    """Return the Dim of a symbolic size: a symbol, or a·symbol + b. Any other expression is left to the export."""
    expression = size.node.expr
    if len(expression.free_symbols) != 1:
        return Dim.AUTO
    (symbol,) = expression.free_symbols
    factor, offset = expression.coeff(symbol, 1), expression.coeff(symbol, 0)
    if expression != factor * symbol + offset or not (factor.is_Integer and offset.is_Integer) or factor < 1:
        return Dim.AUTO
    name = str(symbol)
    if name not in dims:
        bounds = ranges.get(symbol)
        given = {} if bounds is None else {"min": str(bounds.lower), "max": str(bounds.upper)}
        limits = {key: int(value) for key, value in given.items() if value.isdigit()}  # other bounds are infinite
        dims[name] = Dim(name, **limits)
    derived = dims[name] if factor == 1 else int(factor) * dims[name]
    return derived if offset == 0 else derived + int(offset)
