"""The front end 'modules': the model keeps its Python code, and its convolution modules are replaced in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from fxfact.capture.base import Captured, ExampleInputs, samples_of
from fxfact.capture.recorder import ConvCalls, ModuleRecord
from fxfact.conv import (
    ATTENTION_ADVICE,
    ConvSite,
    ConvSpec,
    FactorizedModule,
    Skip,
    factorize_module,
    is_conv,
    mark_tied,
    spec_of,
    torch_conv_class,
    why_state_unsupported,
    write_conv,
)
from fxfact.utils import copy_structure


def capture_modules(
    own: nn.Module,
    example_inputs: ExampleInputs | None,
    record: ModuleRecord | None,
    trusted: Mapping[str, ConvSpec] | None = None,
) -> Captured:
    """Find the convolution modules that a FactorizedModule can replace, and the reason why it cannot replace others.

    Args:
        own: a private copy of the model, which becomes the network of the result.
        example_inputs: the inputs, which are only counted.
        record: the record of a run. It tells which convolutions are called, on which shapes, and how their weights are
            used.
        trusted: without a record, what the convolutions that may be replaced compute, by path, in the order of their
            calls. By default a subclass of a convolution of PyTorch is skipped, because its forward may compute
            something else.
    """
    convs = {path: m for path, m in own.named_modules() if is_conv(m) and not isinstance(m, FactorizedModule)}
    order = [path for path in (record.calls if record else trusted or ()) if path in convs]
    found = {path: _parse(path, convs[path], record, trusted) for path in dict.fromkeys([*order, *convs])}
    found |= {skip.subject: skip for skip in _held_by_others(own, found)}
    found |= {skip.subject: skip for skip in _projections(own, found)}
    sites = mark_tied([item for item in found.values() if isinstance(item, ConvSite)])
    found |= {site.path: site for site in sites}
    samples = samples_of(example_inputs, sites)
    return Captured(
        frontend="modules",
        model=type(own).__name__,
        network=own,
        found=(*found.values(), *(record.by_function if record else ())),
        macs=record.macs // samples if record else None,
        samples=samples,
    )


def dense_replacements(captured: Captured, sites: Sequence[ConvSite]) -> nn.Module:
    """Return a copy in which every site is a FactorizedModule with the convolution as its only stage.

    The copy must compute what the model computes.
    """
    result = copy_structure(captured.network)
    for site in sites:
        module = result.get_submodule(site.path)
        bias = module._parameters["bias"] if site.spec.bias else None
        stages = write_conv(site.spec, cast(Tensor, module.weight), bias)
        factorize_module(module, site.spec, [spec_of(stages[-1])], stages)
    return result


def _parse(
    path: str, module: nn.Module, record: ModuleRecord | None, trusted: Mapping[str, ConvSpec] | None
) -> ConvSite | Skip:
    if reason := _why_not_replaceable(path, module, record, trusted):
        return Skip(reason, path)
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    shapes = tuple(record.calls[path].shapes) if record else None
    spec = next(iter(record.calls[path].specs)) if record else _trusted_spec(path, module, trusted)
    return ConvSite(path=path, spec=spec, weight=weight, bias=bias if spec.bias else None, input_shapes=shapes)


def _trusted_spec(path: str, module: nn.Module, trusted: Mapping[str, ConvSpec] | None) -> ConvSpec:
    """Return what a subclass was seen to compute in an earlier run, or else what the attributes of the module say."""
    found, known = spec_of(module), (trusted or {}).get(path)
    is_plain = type(module) is torch_conv_class(type(module))
    if is_plain or known is None or (found.weight_shape, found.transposed) != (known.weight_shape, known.transposed):
        return found
    return known


def _why_not_replaceable(
    path: str, module: nn.Module, record: ModuleRecord | None, trusted: Mapping[str, ConvSpec] | None
) -> str:
    """Say why a FactorizedModule cannot replace the module, or return "" if it can."""
    if trusted is not None and path not in trusted:
        return "the plan leaves it"
    if reason := why_state_unsupported(module):
        return reason
    if record is not None:
        calls = record.calls.get(path, ConvCalls())
        return "; ".join(calls.obstacles) if calls.shapes or calls.obstacles else "forward does not call it"
    kind = type(module)
    known = trusted is not None or kind is torch_conv_class(kind)
    return "" if known else f"{kind.__name__} may compute more than a convolution: pass example_inputs to find out"


def _projections(own: nn.Module, found: Mapping[str, ConvSite | Skip]) -> list[Skip]:
    """Return a Skip for every projection of a ``nn.MultiheadAttention`` that no module computes."""
    skipped = []
    for path, module in own.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            held = [name for name, parameter in module._parameters.items() if parameter is not None]
            names = [*(name for name in held if name.endswith("proj_weight")), "out_proj"]
            paths = [f"{path}.{name}".lstrip(".") for name in names]
            skipped += [Skip(ATTENTION_ADVICE, name) for name in paths if not isinstance(found.get(name), ConvSite)]
    return skipped


def _held_by_others(own: nn.Module, found: dict[str, ConvSite | Skip]) -> list[Skip]:
    """Return a Skip for every site that shares its weight with a skipped module or with another kind of convolution."""
    holders: dict[int, list[str]] = defaultdict(list)
    for name, parameter in own.named_parameters(remove_duplicate=False):
        holders[id(parameter)].append(name.rpartition(".")[0])
    paths = {id(module): path for path, module in own.named_modules()}  # a module shared between paths counts once
    skipped: dict[str, Skip] = {}
    sites = [item for item in found.values() if isinstance(item, ConvSite)]
    for site in sites:
        owners = dict.fromkeys(paths[id(own.get_submodule(name))] for name in holders[id(site.weight)])
        others = [found.get(owner) for owner in owners]
        kinds = {(other.spec.groups, other.spec.transposed) for other in others if isinstance(other, ConvSite)}
        if not all(isinstance(other, ConvSite) for other in others) or len(kinds) > 1:
            keeper = next(
                (o for o in owners if not isinstance(found.get(o), ConvSite)), "a convolution of another kind"
            )
            skipped[site.path] = Skip(f"its weight is also held by {keeper}", site.path)
    return list(skipped.values())
