"""Graph and mathematics told apart: does a rewritten network compute what its own kernels say?"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxfact.conv import compose
from fxfact.conv_modules import read_stages
from fxfact.errors import VerificationError
from fxfact.graph import ExampleInputs, arguments_of, capture, get_tensor, match
from fxfact.passes import applied

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2


def composed(original: nn.Module, factorized: fx.GraphModule) -> nn.Module:
    """A copy of ``original`` with the kernel of every site that the last plan rewrote replaced by ``compose(chain)``.

    The copy keeps its own Python, so that tracing is checked too; the chains are read back from the modules of
    ``factorized``, not from what was decomposed.
    """
    result = copy.deepcopy(original)
    paths = {decision.path for decision in applied(factorized)[-1].plan.rewrites}
    with torch.no_grad():
        for site in match(capture(result).graph_module).sites:
            weight = get_tensor(result, site.weight_name)
            if site.path in paths and weight is not None:
                weight.copy_(compose(read_stages(list(factorized.get_submodule(site.path).children()))))
    return result


def relative_error(expected: Any, found: Any) -> float:
    """‖found − expected‖ / ‖expected‖ over all floating tensors of two outputs alike in structure; Inf must agree."""
    pairs = [(a.double(), b.double()) for a, b in zip(_floats(expected), _floats(found), strict=True)]
    missed = sum(float(torch.where(a == b, 0.0, b - a).square().sum()) for a, b in pairs)
    total = sum(float(torch.where(a.isfinite(), a, 0.0).square().sum()) for a, _ in pairs)
    return math.sqrt(missed / total if total else missed)


def check_rewrite(original: nn.Module, factorized: fx.GraphModule, example_inputs: ExampleInputs) -> None:
    """Raise VerificationError unless ``factorized`` equals ``composed(original, factorized)`` on these inputs.

    Both run in evaluation mode, on copies. The tolerance is relative: 1e-10 in double, 1e-4 in single precision.
    """
    expected = _run(composed(original, factorized), example_inputs)
    found = _run(copy.deepcopy(factorized), example_inputs)
    error = relative_error(expected, found)
    dtypes = {tensor.dtype for tensor in _floats(expected)}
    tolerance = max((_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in dtypes), default=0.0)
    if not error <= tolerance:
        raise VerificationError(
            f"the rewritten network differs from the original with the same kernels by {error:.2e} (relative), more "
            f"than {tolerance:.0e}: its graph is wrong. Either tracing lost some of the model's Python (a branch on "
            "self.training or on values), or this is a bug to report."
        )


def _run(module: nn.Module, example_inputs: ExampleInputs) -> Any:
    """The output on copies of the inputs, whatever is random in it drawn alike in every run."""
    own = tree_map(lambda value: value.detach().clone() if isinstance(value, Tensor) else value, example_inputs)
    args, kwargs = arguments_of(own)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return module.eval()(*args, **kwargs)


def _floats(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
