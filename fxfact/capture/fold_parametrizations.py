"""Weights that are computed from other parameters become parameters themselves, where the caller agrees to it.

A convolution under weight normalization, spectral normalization or pruning has no weight to decompose, but its value in
evaluation mode is a constant. Folding is for a private copy of a model: it takes that value and drops what computed it.
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
    """Give every convolution whose tensors are computed by ``torch.nn.utils`` the values it has in evaluation mode.

    Parametrizations (``parametrize``, and so its ``weight_norm``, ``spectral_norm`` and ``orthogonal``), the older
    hooks ``weight_norm`` and ``spectral_norm``, and ``prune``. The tensors they were computed from are dropped, not
    written to.
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
    """By hand: ``remove_parametrizations`` takes the property off a class that copies of the module share."""
    if not hasattr(module, "parametrizations"):
        return
    parametrizations = cast(nn.ModuleDict, module.parametrizations)
    values = {name: getattr(module, name).detach().clone() for name in parametrizations}
    sources = {name: list(computing.parameters()) for name, computing in parametrizations.items()}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        _install(module, name, value, sources[name])


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
        held = [f"{name}{suffix}" for suffix in _SOURCES]
        sources = [tensor for tensor in map(module._parameters.get, held) if tensor is not None]
        for source in (name, *held):
            for store in (module._parameters, module._buffers, vars(module)):
                store.pop(source, None)
        del module._forward_pre_hooks[key]
        _install(module, name, value, sources)


def _drop_state_dict_hooks(module: nn.Module) -> None:
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, own in list(hooks.items()):
            if _belongs_to_computing(getattr(own, "hook", own)):
                del hooks[key]


def _belongs_to_computing(hook: object) -> bool:
    """Whether a hook on the state_dict is there for what computed a weight."""
    name = getattr(hook, "__name__", type(hook).__name__)
    return name.startswith(("SpectralNorm", "_weight_norm_compat"))


def _install(module: nn.Module, name: str, value: Tensor, sources: list[nn.Parameter]) -> None:
    trainable = any(source.requires_grad for source in sources)
    module.register_parameter(name, nn.Parameter(value, requires_grad=trainable))
