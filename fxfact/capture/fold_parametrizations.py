"""Turns weights that are computed from other parameters into parameters.

A convolution with weight normalization, spectral normalization or pruning has no weight that can be decomposed. But in
evaluation mode the value of its weight is constant.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxfact.conv import computes_weight, is_conv

_SOURCES = ("_g", "_v", "_u", "_orig", "_mask")


def fold_parametrizations(network: nn.Module) -> None:
    """Replace every computed weight of a convolution by a parameter with its value in evaluation mode, in place.

    This covers ``torch.nn.utils``: parametrizations, with ``weight_norm``, ``spectral_norm`` and ``orthogonal`` among
    them, the older hooks ``weight_norm`` and ``spectral_norm``, and ``prune``. The tensors that the weight was computed
    from are removed from the modules. Their memory is not written to.

    Args:
        network: a private copy of a model.
    """
    for module in list(network.modules()):
        if is_conv(module) and computes_weight(module):
            modes = {part: part.training for part in module.modules()}
            module.eval()
            with torch.no_grad():
                _fold_parametrizations(module)
                _fold_hooks(module)
            _drop_state_dict_hooks(module)
            for part, training in modes.items():
                part.training = training


def _fold_parametrizations(module: nn.Module) -> None:
    """Fold parametrizations. ``remove_parametrizations`` would change a class that copies of the module share."""
    if not hasattr(module, "parametrizations"):
        return
    parametrizations = cast(nn.ModuleDict, module.parametrizations)
    values = {name: getattr(module, name).detach().clone() for name in parametrizations}
    sources = {name: list(parametrization.parameters()) for name, parametrization in parametrizations.items()}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        _set_parameter(module, name, value, sources[name])


def _fold_hooks(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, WeightNorm | SpectralNorm):
            name = hook.name
        elif isinstance(hook, BasePruningMethod):
            name = hook._tensor_name
        else:
            continue
        hook(module, ())
        value = getattr(module, name).detach().clone()
        source_names = [f"{name}{suffix}" for suffix in _SOURCES]
        sources = [tensor for tensor in map(module._parameters.get, source_names) if tensor is not None]
        for source in (name, *source_names):
            for store in (module._parameters, module._buffers, vars(module)):
                store.pop(source, None)
        del module._forward_pre_hooks[key]
        _set_parameter(module, name, value, sources)


def _drop_state_dict_hooks(module: nn.Module) -> None:
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if _is_of_computed_weight(getattr(hook, "hook", hook)):
                del hooks[key]


def _is_of_computed_weight(hook: object) -> bool:
    """Return whether a state_dict hook was registered for a computed weight."""
    name = getattr(hook, "__name__", type(hook).__name__)
    return name.startswith(("SpectralNorm", "_weight_norm_compat"))


def _set_parameter(module: nn.Module, name: str, value: Tensor, sources: list[nn.Parameter]) -> None:
    trainable = any(source.requires_grad for source in sources)
    module.register_parameter(name, nn.Parameter(value, requires_grad=trainable))
