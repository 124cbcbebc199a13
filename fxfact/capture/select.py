"""The ladder: of the ways to capture a model, the one that is seen to be right and reaches most convolutions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from fxfact.capture.base import Captured, ExampleInputs, Frontend, reason_of, seeded_rng
from fxfact.capture.equivalence import EquivalenceCheck
from fxfact.capture.export import capture_exported
from fxfact.capture.fold_parametrizations import fold_parametrizations as fold
from fxfact.capture.guards import ParameterGuard
from fxfact.capture.modules import capture_modules, dense_replacements
from fxfact.capture.trace import capture_graph
from fxfact.conv import ConvSite, Skip, has_hooks, path_of
from fxfact.errors import ArgumentError, ArgumentTypeError, CaptureError
from fxfact.utils import alias_copy, copy_structure

CaptureMode = Literal["auto", "trace", "modules", "export"]
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


@torch.inference_mode(False)  # in which tensors do not tell that they were written to
def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs | None = None,
    *,
    how: CaptureMode = "auto",
    fold_weights: bool = False,
    leaf_modules: str | Sequence[str] = (),
    trusted: Collection[str] | None = None,
) -> Captured:
    """Make a model ready for rewriting, without touching it.

    ``how``: 'trace', as one graph; 'modules', keeping the model's own Python; 'export', as an ExportedProgram. With
    ``example_inputs`` (a tuple is the arguments, a mapping the keyword arguments, a tensor one argument) each of them
    is compared with the model itself, on them and on others drawn alike, and 'auto' takes the one of the first two
    that reaches most convolutions, a graph where they are level. Without, 'auto' is a graph, and of an ExportedProgram
    always the third.
    ``fold_weights`` makes weights that are computed from other parameters parameters themselves. ``leaf_modules`` are globs
    on the paths of modules that tracing does not look into. ``trusted`` names, for 'modules', the convolutions that an
    earlier capture found.
    Raises ArgumentError, ArgumentTypeError, CaptureError.
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
    own = alias_copy(model)
    if fold_weights:
        with ParameterGuard(own), seeded_rng():
            fold(own)
    globs = _globs(leaf_modules, own)
    without_values = any(parameter.is_meta for parameter in own.parameters())
    reference = None if example_inputs is None or without_values else EquivalenceCheck.of(model, own, example_inputs)
    frontends: dict[Frontend, Callable[[], Captured]] = {
        "trace": lambda: _checked(
            capture_graph(copy_structure(own), example_inputs, fold_weights=fold_weights, leaf_modules=globs), reference
        ),
        "modules": lambda: _checked_modules(own, example_inputs, reference, trusted),
    }
    tried = {frontend: run_frontend for frontend, run_frontend in frontends.items() if how in ("auto", frontend)}
    if how == "auto" and reference is None:
        del tried["modules"]  # what forward does to its modules only a run can show
    best = _best(tried, type(model).__name__)
    return replace(best, example_inputs=example_inputs, fold_weights=fold_weights, leaf_modules=globs)


def _globs(leaf_modules: str | Sequence[str], own: nn.Module) -> tuple[str, ...]:
    patterns = (leaf_modules,) if isinstance(leaf_modules, str) else leaf_modules
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentTypeError(f"leaf_modules must be a glob or a list of globs, got {leaf_modules!r}")
    paths = [path for path, _ in own.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ArgumentError(f"leaf_modules: no module at {pattern!r}")
    return tuple(patterns)


def check_model(model: object) -> None:
    """Raise ArgumentTypeError unless it is a module, CaptureError where it has to be unwrapped or run first."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"model must be a torch.nn.Module or a torch.export.ExportedProgram, got {type(model).__name__}. Pass the "
            "network itself."
        )
    name = type(model).__name__
    check_kept_by_copies(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a ScriptModule has no Python that fxfact can read. Pass the nn.Module it was made from.")
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
    """Raise CaptureError for what copies of graph modules, the model itself or some of its own, do not keep."""
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule) and ("forward" in vars(module) or has_hooks(module)):
            raise CaptureError(
                f"the GraphModule {f'at {path} ' if path else ''}has hooks or a forward of its own, which copies of it "
                "lose. Remove them before; of an ExportedProgram pass itself, not its module()."
            )


def _checked(captured: Captured, reference: EquivalenceCheck | None) -> Captured:
    if reference is not None and (reason := reference.objection(copy_structure(captured.network))):
        raise CaptureError(reason)
    return replace(captured, compared=reference is not None)


def _checked_modules(
    own: nn.Module,
    example_inputs: ExampleInputs | None,
    reference: EquivalenceCheck | None,
    trusted: Collection[str] | None,
) -> Captured:
    captured = capture_modules(own, example_inputs, reference.observed if reference else None, trusted)
    if reference is None:
        return captured
    wrong = _wrong(captured, captured.sites, reference)
    left = [Skip(wrong[path_of(item)], path_of(item)) if path_of(item) in wrong else item for item in captured.found]
    captured = replace(captured, found=tuple(left), compared=True)
    if wrong and (reason := reference.objection(dense_replacements(captured, captured.sites))):
        raise CaptureError(reason)
    return captured


def _wrong(captured: Captured, sites: Sequence[ConvSite], reference: EquivalenceCheck) -> dict[str, str]:
    """The sites whose stand-ins do not compute the same, found by halving, and why."""
    try:
        reason = reference.objection(dense_replacements(captured, sites))
    except Exception as error:
        reason = f"it cannot be replaced: {reason_of(error)}"
    if not reason or len(sites) < 2:
        return {site.path: f"in its place, {reason}" for site in sites} if reason else {}
    half = len(sites) // 2
    return _wrong(captured, sites[:half], reference) | _wrong(captured, sites[half:], reference)


def _best(frontends: dict[Frontend, Callable[[], Captured]], name: str) -> Captured:
    """The first frontend that leaves nothing out, else the one with most sites; raises CaptureError where all fail."""
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
        unseen = " Pass example_inputs, on which the model can be seen to run." if "modules" not in frontends else ""
        raise CaptureError(f"{name} cannot be captured. {'; '.join(refused)}.{unseen}")
    return replace(best, refused=tuple(refused))
