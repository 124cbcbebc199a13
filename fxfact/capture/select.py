"""Selects the front end for a model: the one that reaches most convolutions and computes what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from fxfact.capture.base import Captured, ExampleInputs, Frontend, reason_of, seeded_rng
from fxfact.capture.equivalence import EquivalenceCheck
from fxfact.capture.export import capture_exported
from fxfact.capture.fold_parametrizations import fold_parametrizations
from fxfact.capture.guards import ParameterGuard, PrivateCopy
from fxfact.capture.modules import capture_modules, dense_replacements
from fxfact.capture.trace import capture_graph
from fxfact.conv import ConvSite, Skip, has_hooks, path_of
from fxfact.errors import ArgumentError, ArgumentTypeError, CaptureError
from fxfact.utils import alias_copy

CaptureMode = Literal["auto", "trace", "modules", "export"]
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


@torch.inference_mode(False)  # tensors made in inference mode have no version, and writes to them go unnoticed
def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs | None = None,
    *,
    how: CaptureMode = "auto",
    fold_weights: bool = False,
    leaf_modules: str | Sequence[str] = (),
    trusted: Collection[str] | None = None,
) -> Captured:
    """Make a model ready for rewriting. The model itself is not changed.

    Args:
        model: the model.
        example_inputs: a tuple of positional arguments, a mapping of keyword arguments, or a tensor as the only
            argument. The captured network is compared with the model on them, and on random inputs like them.
        how: the front end. 'trace' makes one graph of the model. 'modules' keeps the model's Python code and replaces
            its convolution modules. 'export' is for an exported program. 'auto' takes 'export' for an exported
            program. For a module with example inputs it takes 'trace' or 'modules', whichever reaches more
            convolutions, and 'trace' if both reach all. Without example inputs it takes 'trace'.
        fold_weights: whether to turn weights that are computed from other parameters into parameters.
        leaf_modules: globs on the paths of modules that tracing keeps whole.
        trusted: for 'modules', the paths of the convolutions that an earlier capture found.

    Returns:
        The captured model.

    Raises:
        ArgumentError: if ``how`` does not fit the model, or a glob matches no module.
        ArgumentTypeError: if the model is no module and no exported program.
        CaptureError: if no front end can capture the model. The message has the reason of each.
    """
    if how not in get_args(CaptureMode):
        raise ArgumentError(f"capture must be one of {', '.join(map(repr, get_args(CaptureMode)))}, got {how!r}")
    if isinstance(model, ExportedProgram):
        if how not in ("auto", "export"):
            raise ArgumentError(f"an ExportedProgram is captured by 'export', got capture={how!r}")
        return capture_exported(model, fold_weights=fold_weights)
    check_model(model)
    if how == "export":
        raise ArgumentError("capture='export' is for an ExportedProgram: pass torch.export.export(model, args)")
    plain = PrivateCopy(lambda: alias_copy(model))
    copies = PrivateCopy(lambda: _folded_copy(model)) if fold_weights else plain
    globs = _globs(leaf_modules, copies.get())
    without_values = any(parameter.is_meta for parameter in model.parameters())
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
    advice = " Use capture='auto' or 'modules'." if check else " Pass example_inputs, or use capture='modules'."
    best = _best(selected, type(model).__name__, "" if "modules" in selected else advice)
    return replace(best, example_inputs=example_inputs, fold_weights=fold_weights, leaf_modules=globs)


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
    if name in _WRAPPERS or name.startswith("FSDP"):
        raise CaptureError(
            f"{name} wraps the network: factorize what it wraps (.module, ._orig_mod), then wrap the result."
        )
    for path, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise CaptureError(f"{path}: the parameter is lazy and has no shape. Run the model once on an input first.")
        if tensor.is_inference():
            raise CaptureError(f"{path}: the parameter was made in inference mode. Make the model outside of it.")


def check_kept_by_copies(model: nn.Module) -> None:
    """Raise CaptureError for a GraphModule with hooks or a replaced forward, which copies of it lose."""
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule) and ("forward" in vars(module) or has_hooks(module)):
            raise CaptureError(
                f"the GraphModule {f'at {path} ' if path else ''}has hooks or a forward of its own, which copies of it "
                "lose. Remove them before. If it is the module() of an exported program, pass the program itself."
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
    trusted: Collection[str] | None,
) -> Captured:
    """Capture by modules, and skip every convolution whose replacement does not compute the same."""
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


def _best(frontends: Mapping[Frontend, Callable[[], Captured]], name: str, advice: str) -> Captured:
    """Run front ends until one reaches every convolution. Return the one that reaches most.

    Raises:
        CaptureError: if all front ends fail. The message ends with the advice.
    """
    best: Captured | None = None
    refused: list[str] = []
    for frontend, run_frontend in frontends.items():
        try:
            found = run_frontend()
        except CaptureError as error:
            refused.append(f"{frontend}: {str(error).rstrip('.')}")
            continue
        if best is None or len(found.sites) > len(best.sites):
            if best is not None:
                refused.append(f"{best.frontend}: {len(best.sites)} convolutions, not {len(found.sites)}")
            best = found
        if all(isinstance(item, ConvSite) for item in found.found):
            break
    if best is None:
        raise CaptureError(f"{name} cannot be captured. {'; '.join(refused)}.{advice}")
    return replace(best, refused=tuple(refused))
