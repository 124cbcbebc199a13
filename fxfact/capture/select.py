"""Selects the front end for a model: the one that reaches most convolutions and computes what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from fxfact.capture.adapters import find_adapters
from fxfact.capture.base import Captured, ExampleInputs, Frontend, reason_of, seeded_rng
from fxfact.capture.equivalence import EquivalenceCheck
from fxfact.capture.export import capture_exported
from fxfact.capture.fold_parametrizations import fold_parametrizations
from fxfact.capture.guards import ParameterChangedError, ParameterGuard, PrivateCopy
from fxfact.capture.modules import capture_modules, dense_replacements
from fxfact.capture.trace import capture_graph
from fxfact.conv import FOLD_ADVICE, ConvSite, ConvSpec, Skip, has_hooks, path_of
from fxfact.errors import ArgumentError, ArgumentTypeError, CaptureError
from fxfact.utils import alias_copy, is_distributed

CaptureMode = Literal["auto", "trace", "modules", "export"]
_UNSHARDED_ADVICE = (
    "Factorize the model before fully_shard, FullyShardedDataParallel or distribute_tensor, or load the unsharded "
    "state (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) into a new model "
    "and factorize that."
)
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "OptimizedModule")
_MAX_LISTED = 5  # lost members that a reason names


@torch.inference_mode(False)  # tensors made in inference mode have no version, and writes to them go unnoticed
def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs | None = None,
    *,
    how: CaptureMode = "auto",
    keep_members: bool = False,
    fold_weights: bool = False,
    leaf_modules: str | Sequence[str] = (),
    trusted: Mapping[str, ConvSpec] | None = None,
) -> Captured:
    """Make a model ready for rewriting. The model itself is not changed.

    Args:
        model: the model.
        example_inputs: a tuple of positional arguments, a mapping of keyword arguments, or a tensor as the only
            argument. The captured network is compared with the model on them, and on random inputs like them.
        how: the front end. 'trace' makes one graph of the model. 'modules' keeps the model's Python code and replaces
            its convolution modules. 'export' is for an exported program. 'auto' takes 'export' for an exported
            program. For a module with example inputs it takes 'trace' or 'modules', whichever reaches more
            convolutions, and 'trace' if both reach as many. Without example inputs it takes 'trace'.
        keep_members: whether 'auto' takes 'modules' where both reach as many convolutions and a graph would lose
            public methods or properties of the model's class.
        fold_weights: whether to turn weights that are computed from other parameters into parameters.
        leaf_modules: globs on the paths of modules that tracing keeps whole.
        trusted: for 'modules', what the convolutions compute that an earlier capture found, by path.

    Returns:
        The captured model.

    Raises:
        ParameterChangedError: if forward changes a parameter, also if only in training mode.
        ArgumentError: if ``how`` does not fit the model, or a glob matches no module.
        ArgumentTypeError: if the model is no module and no exported program.
        CaptureError: if no front end can capture the model. The message has the reason of each.
    """
    if how not in get_args(CaptureMode):
        raise ArgumentError(f"capture must be one of {', '.join(map(repr, get_args(CaptureMode)))}, got {how!r}")
    if isinstance(model, ExportedProgram):
        if how not in ("auto", "export"):
            raise ArgumentError(f"an ExportedProgram is captured by 'export', got capture={how!r}")
        exported = capture_exported(model, example_inputs, fold_weights=fold_weights)
        return replace(exported, adapters=find_adapters(exported.network))
    check_model(model)
    if how == "export":
        raise ArgumentError("capture='export' is for an ExportedProgram: pass torch.export.export(model, args)")
    plain = PrivateCopy(lambda: alias_copy(model))
    copies = PrivateCopy(lambda: _folded_copy(model)) if fold_weights else plain
    globs = _globs(leaf_modules, copies.get())
    without_values = _is_on_meta(model, example_inputs)
    check = None if example_inputs is None or without_values else EquivalenceCheck.of(model, plain, example_inputs)
    frontends: dict[Frontend, Callable[[], Captured]] = {
        "trace": lambda: _compared_graph(
            capture_graph(copies, example_inputs, fold_weights=fold_weights, leaf_modules=globs), check, plain
        ),
        "modules": lambda: _compared_modules(copies, example_inputs, check, trusted),
    }
    selected = {frontend: run_frontend for frontend, run_frontend in frontends.items() if how in ("auto", frontend)}
    if how == "auto" and check is None:
        del selected["modules"]  # only a run can show what forward does with its convolutions
    advice = _advice(selected, how, example_inputs, check)
    if trusted is not None:  # the caller applies a plan, which says how to capture
        advice = f" The plan was made for a model that {how!r} can capture. Make a new plan of this one."
    best = _best(selected, type(model).__name__, advice, keep_members)
    if how == "auto" and best.lost_members:
        best = replace(best, refused=_explain_loss(best, with_inputs=check is not None))
    if fold_weights:
        best = replace(best, found=tuple(map(_without_fold_advice, best.found)))
    best = replace(best, adapters=find_adapters(model))
    return replace(best, example_inputs=example_inputs, fold_weights=fold_weights, leaf_modules=globs)


def _without_fold_advice(item: ConvSite | Skip) -> ConvSite | Skip:
    """Return the item with a reason that does not advise fold_weights=True, which was passed."""
    if isinstance(item, ConvSite) or not item.reason.endswith(FOLD_ADVICE):
        return item
    reason = item.reason.removesuffix(FOLD_ADVICE)
    return replace(item, reason=f"{reason}, and not by torch.nn.utils, so that fold_weights=True does not fold it")


def check_model(model: object) -> None:
    """Check that a model can be captured.

    Raises:
        ArgumentTypeError: if it is no module.
        CaptureError: if it must be unwrapped or run first.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"model must be a torch.nn.Module or a torch.export.ExportedProgram, got {type(model).__name__}. Pass the "
            "network itself."
        )
    name = type(model).__name__
    check_kept_by_copies(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a ScriptModule has no Python code. Pass the nn.Module that it was made from.")
    if name in _WRAPPERS:
        raise CaptureError(
            f"{name} wraps the network: factorize what it wraps (.module, ._orig_mod), then wrap the result."
        )
    for path, module in model.named_modules():
        if type(module).__name__.startswith(("FSDP", "FullyShardedDataParallel")):
            raise CaptureError(
                f"{path or 'the model'} is a {type(module).__name__}, whose parameters are split among processes. "
                f"{_UNSHARDED_ADVICE}"
            )
    for path, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise CaptureError(f"{path}: the parameter is lazy and has no shape. Run the model once on an input first.")
        if is_distributed(tensor):
            raise CaptureError(
                f"{path}: the parameter is a {type(tensor.data).__name__}, which belongs to several processes. "
                f"{_UNSHARDED_ADVICE}"
            )
        if tensor.is_inference():
            raise CaptureError(f"{path}: the parameter was made in inference mode. Make the model outside of it.")


def check_kept_by_copies(model: nn.Module) -> None:
    """Raise CaptureError for a GraphModule with hooks or a replaced forward, which copies of it lose."""
    for path, module in model.named_modules():
        if not isinstance(module, fx.GraphModule):
            continue
        place = f"the GraphModule {f'at {path} ' if path else ''}"
        if any(kind.__name__ == "_StatefulGraphModule" for kind in type(module).__mro__):
            way = "Use the original module there" if path else "Pass the ExportedProgram"
            raise CaptureError(
                f"{place}is the module() of an ExportedProgram, whose checks of the inputs a copy of it loses. {way}."
            )
        if "forward" in vars(module) or has_hooks(module):
            raise CaptureError(
                f"{place}has hooks or a forward of its own, which copies of it lose. Remove them before."
            )


def _folded_copy(model: nn.Module) -> nn.Module:
    network = alias_copy(model)
    with ParameterGuard(network), seeded_rng():
        fold_parametrizations(network)
    return network


def _globs(leaf_modules: str | Sequence[str], network: nn.Module) -> tuple[str, ...]:
    patterns = (leaf_modules,) if isinstance(leaf_modules, str) else leaf_modules
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentTypeError(f"leaf_modules must be a glob or a list of globs, got {leaf_modules!r}")
    paths = [path for path, _ in network.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ArgumentError(f"leaf_modules: no module at {pattern!r}")
    return tuple(patterns)


def _compared_graph(captured: Captured, check: EquivalenceCheck | None, plain: PrivateCopy) -> Captured:
    """Compare a graph with the model. Raises CaptureError if it computes something else."""
    if check is None:
        return captured
    if reason := check.graph_mismatch(cast(fx.GraphModule, captured.network)):
        check.check_deterministic(plain.get())
        raise CaptureError(reason)
    return replace(captured, compared=True)


def _compared_modules(
    copies: PrivateCopy,
    example_inputs: ExampleInputs | None,
    check: EquivalenceCheck | None,
    trusted: Mapping[str, ConvSpec] | None,
) -> Captured:
    """Capture by modules, and skip every convolution whose replacement does not compute the same."""
    if check:
        check.check_parameters(copies.take())
    record = check.record(copies.take()) if check else None
    captured = capture_modules(copies.get(), example_inputs, record, trusted)
    if check is None:
        return captured
    wrong = _wrong_sites(captured, captured.sites, check)
    found = [Skip(wrong[path_of(item)], path_of(item)) if path_of(item) in wrong else item for item in captured.found]
    captured = replace(captured, found=tuple(found), compared=True)
    if wrong and (reason := check.mismatch(dense_replacements(captured, captured.sites))):
        raise CaptureError(reason)
    return captured


def _wrong_sites(captured: Captured, sites: Sequence[ConvSite], check: EquivalenceCheck) -> dict[str, str]:
    """Find by bisection the convolutions whose replacements do not compute the same. Map their paths to the reason."""
    try:
        reason = check.mismatch(dense_replacements(captured, sites))
    except Exception as error:
        reason = f"it cannot be replaced: {reason_of(error)}"
    if not reason or len(sites) < 2:
        return {site.path: f"in its place, {reason}" for site in sites} if reason else {}
    half = len(sites) // 2
    return _wrong_sites(captured, sites[:half], check) | _wrong_sites(captured, sites[half:], check)


def _advice(
    selected: Collection[Frontend],
    how: CaptureMode,
    example_inputs: ExampleInputs | None,
    check: EquivalenceCheck | None,
) -> str:
    """Say how a caller can use the front end 'modules', if it was not tried."""
    if "modules" in selected:
        return ""
    if how == "trace" and check is not None:
        return " Use capture='auto' or 'modules'."
    can_pass_inputs = how == "auto" and example_inputs is None
    return " Pass example_inputs, or use capture='modules'." if can_pass_inputs else " Use capture='modules'."


def _best(frontends: Mapping[Frontend, Callable[[], Captured]], name: str, advice: str, keep_members: bool) -> Captured:
    """Run front ends until one reaches every convolution. Return the one that reaches most.

    With ``keep_members`` the last one is preferred among equals if the others lose members of the model's class.

    Raises:
        ParameterChangedError: if forward changes a parameter.
        CaptureError: if all front ends fail. The message ends with the advice.
    """
    best: Captured | None = None
    refused: list[str] = []
    for frontend, run_frontend in frontends.items():
        try:
            found = run_frontend()
        except ParameterChangedError:
            raise
        except CaptureError as error:
            refused.append(f"{frontend}: {str(error).rstrip('.')}")
            continue
        if best is None:
            best = found
        elif len(found.sites) > len(best.sites):
            refused.append(f"{best.frontend}: {len(best.sites)} layers, not {len(found.sites)}")
            best = found
        elif keep_members and best.lost_members and len(found.sites) == len(best.sites):
            refused.append(f"{best.frontend}: the graph would lose {_list_members(best)}")
            best = found
        elif keep_members and best.lost_members:
            refused.append(f"{found.frontend}: {len(found.sites)} layers, not {len(best.sites)}")
        is_complete = all(isinstance(item, ConvSite) for item in best.found)
        if is_complete and not (keep_members and best.lost_members):
            break
    if best is None:
        raise CaptureError(f"{name} cannot be captured. {'; '.join(refused)}.{advice}")
    return replace(best, refused=tuple(refused))


def _explain_loss(captured: Captured, *, with_inputs: bool) -> tuple[str, ...]:
    """Add to the reasons against 'modules' which members of the model's class the graph has lost."""
    reasons = {reason.partition(":")[0]: reason for reason in captured.refused}
    why = "because capture='auto' prefers a graph here" if with_inputs else "without a run on example_inputs"
    reason = reasons.get("modules", f"modules: not tried, {why}")
    return (*(r for r in captured.refused if r != reason), f"{reason}. The graph loses {_list_members(captured)}")


def _list_members(captured: Captured) -> str:
    names, more = captured.lost_members[:_MAX_LISTED], len(captured.lost_members) - _MAX_LISTED
    return f"{', '.join(names)}{f' and {more} more methods or properties' if more > 0 else ''} of {captured.model}"


def _is_on_meta(model: nn.Module, example_inputs: ExampleInputs | None) -> bool:
    """Return whether the model has no values to run with. Raises CaptureError if the example inputs have values."""
    names = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    devices = {str(leaf.device) for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)} - {"meta"}
    if names and devices:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CaptureError(
            f"{', '.join(names[:3])}{more} of {type(model).__name__} are on the meta device and have no values, but "
            f"example_inputs are on {', '.join(sorted(devices))}. Move the inputs to the meta device (x.to('meta')), "
            "or give the model values: model.to_empty(device=...), then load_state_dict."
        )
    return any(parameter.is_meta for parameter in model.parameters())
