"""Moves layers and checkpoints of TensorLy-Torch 0.5 over, without importing it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, cast

import torch
from tensorly.cp_tensor import CPTensor
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor
from torch import Tensor, nn

from fxfact.conv import ConvNd, ConvSpec, has_hooks, is_conv, spec_of, to_torch, write_conv_module
from fxfact.errors import ArgumentError, ArgumentTypeError, RankError, RefusedError, error_context, first_differences
from fxfact.nn.factors import FactorizedTensor, read_factors, with_tensorly
from fxfact.nn.joint import JointConv, SharedConv
from fxfact.nn.joint_tensor import JointTensors
from fxfact.nn.layers import FactorizedConv
from fxfact.nn.rank_regularizers import tensor_dropout
from fxfact.utils import warn_caller

_KINDS = ("CPTensor", "TuckerTensor", "TTTensor", "DenseTensor")
_KEYS = "weight.factors.factor_0, weight.factors.factor_1, …"


def from_tltorch(layer_or_model: nn.Module) -> nn.Module:
    """Return the layer for a ``FactorizedConv`` of TensorLy-Torch, or a copy of a model with all of them replaced.

    Args:
        layer_or_model: a ``tltorch.FactorizedConv``, or a model that contains some. It is not changed, and shares no
            tensor with the result.

    Returns:
        For a layer a ``FactorizedConv`` with equal outputs, a ``JointConv`` if it has several convolutions, or an
        ``nn.Conv…`` if its weight is dense. For a model a copy. A rank that is larger than a chain can use is lowered,
        and Tucker's spatial factors are multiplied with the core, which are both exact.

    Raises:
        ArgumentTypeError: if there is no ``FactorizedConv`` of TensorLy-Torch.
        RefusedError: if one cannot be moved: its tensor is complex or of a tensorized layer, or it has hooks other than
            tensor dropout and tensor lasso.
    """
    if not isinstance(layer_or_model, nn.Module):
        raise ArgumentTypeError(f"pass a layer or a model, got {type(layer_or_model).__name__}")
    if _is_conv(layer_or_model, "FactorizedConv"):
        return _converted(layer_or_model)
    found = {p: m for p, m in layer_or_model.named_modules(remove_duplicate=False) if _is_conv(m, "FactorizedConv")}
    if not found:
        name = type(layer_or_model).__name__
        raise ArgumentTypeError(
            f"{name} has no FactorizedConv of TensorLy-Torch (tltorch), which is what can be moved."
        )
    converted: dict[int, nn.Module] = {}
    for path, module in found.items():
        with error_context(path):
            converted[id(module)] = converted.get(id(module)) or _converted(module)
    _warn_of_others(layer_or_model)
    for module in layer_or_model.modules():
        if _is_conv(module, "SubFactorizedConv"):
            shared: Any = module
            converted[id(module)] = cast(JointConv, converted[id(shared.main_conv)])[shared.indices]
    memo: dict[int, Any] = dict(converted)  # deepcopy takes these for the copies of the layers
    return copy.deepcopy(layer_or_model, memo)


def _is_conv(module: nn.Module, name: str) -> bool:
    return any(_is_of_tltorch(kind) and kind.__name__ == name for kind in type(module).__mro__)


def _is_of_tltorch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "tltorch"


def _warn_of_others(model: nn.Module) -> None:
    kinds = ("FactorizedLinear", "FactorizedEmbedding", "TRL", "TCL")
    names = [path for path, m in model.named_modules() if _is_of_tltorch(type(m)) and type(m).__name__ in kinds]
    if names:
        warn_caller(f"layers of TensorLy-Torch that are no convolutions stay as they are: {', '.join(names)}")


@torch.no_grad()
def _converted(layer: Any) -> nn.Module:
    """Return the layer of fxfact for one of TensorLy-Torch. Raises RefusedError."""
    kind = type(layer.weight).__name__
    if kind not in _KINDS:
        raise RefusedError(f"a weight of the type {kind} cannot be moved, only {', '.join(_KINDS)}.")
    dropouts, lassos = _rank_hooks(layer, "TensorDropout"), _rank_hooks(layer, "TensorLasso")
    if has_hooks(layer) or len(layer.weight._forward_hooks) > len(dropouts) + len(lassos):
        raise RefusedError("it has hooks, which would be lost. Remove them, and register them on the new layer.")
    if layer.n_layers != 1:
        return _joint(layer)
    settings: dict[str, Any] = {
        name: tuple(getattr(layer, name).tolist()) for name in ("stride", "padding", "dilation")
    }
    if kind == "DenseTensor":
        return _dense(layer, settings)
    factors = _factors(kind, layer.weight.state_dict(), [f"factors.{key}" for key in layer.weight.factors.keys])
    implementation = layer.implementation
    if kind != "CPTensor" and implementation == "mobilenet":
        implementation = "factorized"  # as TensorLy-Torch computes it
    new = FactorizedConv.from_factors(factors, bias=layer.bias, implementation=implementation, **settings)
    trained = [parameter.requires_grad for parameter in layer.parameters()]
    if any(trained) != all(trained):
        warn_caller(
            "a layer of TensorLy-Torch has frozen and trained tensors. All parameters of the new one are trained."
        )
    if lassos:
        warn_caller(
            "the gains of a tensor lasso became part of the factors. Call fxfact.nn.tensor_lasso to go on with one."
        )
    for dropout in dropouts:
        options = {name: getattr(dropout, name) for name in ("min_dim", "min_values", "drop_test")}
        tensor_dropout(new, dropout.proba, **options)
    return new.requires_grad_(any(trained)).train(layer.training)


def _rank_hooks(layer: Any, base: str) -> list[Any]:
    """Return the hooks of a class of TensorLy-Torch on the weight of a layer."""
    hooks = layer.weight._forward_hooks.values()
    return [hook for hook in hooks if base in (kind.__name__ for kind in type(hook).__mro__)]


def _joint(layer: Any) -> JointConv:
    """Return the joint layer for one of several convolutions."""
    kind, layers = type(layer.weight).__name__, tuple(layer.layers_shape)
    if kind == "DenseTensor" or layer.implementation == "mobilenet":
        raise RefusedError(f"a joint layer with a {kind} and implementation={layer.implementation!r} cannot be moved.")
    dense: dict[str, Any] = {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
    }
    specs = []
    for place in product(*map(range, layers)):
        settings: dict[str, Any] = {
            name: tuple(getattr(layer, name)[place].tolist()) for name in ("stride", "padding", "dilation")
        }
        has_bias = layer.bias is not None and bool(layer.has_bias[place])
        specs.append(ConvSpec.parse(**dense, **settings, bias=has_bias))
    names = [f"factors.{key}" for key in layer.weight.factors.keys]
    tensors = _joint_tensors(kind, layer.weight.state_dict(), names, len(layers))
    new = JointConv.holding(
        layers,
        specs,
        (None if tensors[0] is None else tensors[0].clone(), [factor.clone() for factor in tensors[1]]),
        None if layer.bias is None else layer.bias.detach().clone(),
        factorization=kind.removesuffix("Tensor").lower(),
        implementation=layer.implementation,
    )
    trained = any(parameter.requires_grad for parameter in layer.parameters())
    return new.requires_grad_(trained).train(layer.training)


def _joint_tensors(kind: str, tensors: Mapping[str, Tensor], names: Sequence[str], axes: int) -> JointTensors:
    """Return the core and the factors of a joint layer. Tucker's spatial factors become part of the core."""
    factors = [tensors[name] for name in names]
    if kind != "TuckerTensor":
        return tensors.get("weights"), factors
    core = tensors["core"]
    for axis, factor in enumerate(factors[axes + 2 :], start=axes + 2):
        core = torch.tensordot(core, factor, dims=([axis], [1])).movedim(-1, axis)
    return core, factors[: axes + 2]


def _dense(layer: Any, settings: Mapping[str, Any]) -> nn.Module:
    weight, bias = (None if t is None else t.detach().clone() for t in (layer.weight.tensor, layer.bias))
    assert weight is not None
    out_channels, in_channels, *kernel = weight.shape
    spec = ConvSpec.parse(in_channels, out_channels, kernel, bias=bias is not None, **settings)
    trained = layer.weight.tensor.requires_grad
    conv = write_conv_module(
        spec, weight.requires_grad_(trained), None if bias is None else bias.requires_grad_(trained)
    )
    return conv.train(layer.training)


def _factors(kind: str, tensors: Mapping[str, Tensor], names: Sequence[str]) -> FactorizedTensor:
    """Return the tensor of TensorLy for those of a state dict. ``names`` are those of the factors in order.

    The gains of a lasso multiply the columns of the factors. TensorLy-Torch's CP layers do not use theirs.
    """
    gains = [tensors.get(f"lasso_weights.param_{k}", torch.ones(())) for k in range(len(names))]
    factors = [tensors[name] * gain.to(tensors[name]) for name, gain in zip(names, gains, strict=True)]
    with with_tensorly():
        if kind == "CPTensor":
            return CPTensor((tensors["weights"], factors))
        return TTTensor(factors) if kind == "TTTensor" else TuckerTensor((tensors["core"], factors))


def load_tltorch_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state dict of TensorLy-Torch 0.5 into a model with the layers of ``fxfact.nn`` in place of its own.

    Args:
        model: the model. Its modules have the paths of those that wrote the state dict. Its layers have the same
            factorization and rank, or the largest rank that a chain can use if that in the state dict is larger.
        state_dict: the state dict. The tensors of all other modules are loaded as ``load_state_dict`` does.

    Raises:
        ArgumentError: if keys are missing or left over, or a tensor has another shape. Then nothing was loaded.
        RankError: if a layer has another rank. Then nothing was loaded.
    """
    given, translated = dict(state_dict), dict[str, Tensor]()
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        with error_context(path or type(module).__name__):
            if isinstance(module, FactorizedConv | JointConv):
                parent, _, name = path.rpartition(".")
                is_shared = name == "joint" and isinstance(model.get_submodule(parent), SharedConv)
                theirs = f"{prefix.removesuffix('joint.')}main_conv." if is_shared else prefix
                own = {key: given.pop(key) for key in list(given) if key.startswith(theirs)}
                tensors = {key.removeprefix(theirs): tensor for key, tensor in own.items()}
                state = (
                    _joint_state(module, tensors) if isinstance(module, JointConv) else _stage_state(module, tensors)
                )
                translated.update({prefix + key: tensor for key, tensor in state.items()})
            elif (dense := given.pop(f"{prefix}weight.tensor", None)) is not None:
                translated[f"{prefix}weight"] = _dense_weight(module, dense)
    _load_exactly(model, {**given, **translated})


def _stage_state(layer: FactorizedConv, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a layer for the tensors that TensorLy-Torch's layer at its path has."""
    bias = ["bias"] if layer.bias is not None else []
    kind, own, names = _read_keys(tensors, layer.order + 2, bias)
    read = read_factors(_factors(kind, own, names))
    spec, same = layer.spec, type(read.factorization) is type(layer.factorization)
    if not same or read.kernel_shape != spec.weight_shape:
        raise ArgumentError(
            f"the state dict has a {kind} for a kernel {read.kernel_shape}, and the layer is "
            f"{layer.factorization.name} with a kernel {spec.weight_shape}. "
            "Make the layer with the arguments of TensorLy-Torch's."
        )
    structure, weights = read.fit(spec, layer.implementation)
    if structure.rank != layer.rank:
        raise RankError(
            f"the state dict has the rank {structure.rank}, and the layer has {layer.rank}. Make it with that."
        )
    stages = zip(layer.stage_names, structure.stages, weights, strict=True)
    state = {f"{name}.weight": to_torch(stage, weight) for name, stage, weight in stages}
    return {**state, **{f"{layer.stage_names[-1]}.{name}": tensors[name] for name in bias}}


def _joint_state(layer: JointConv, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a joint layer for the tensors of TensorLy-Torch's."""
    axes = len(layer.n_layers)
    bias = ["bias"] if layer.bias is not None else []
    kind, own, names = _read_keys(tensors, axes + layer.spec_at((0,) * axes).order + 2, bias)
    core, factors = _joint_tensors(kind, own, names, axes)
    state = {f"factors.{k}": factor for k, factor in enumerate(factors)} | {name: tensors[name] for name in bias}
    return state if core is None else {**state, "core": core}


def _read_keys(
    tensors: Mapping[str, Tensor], modes: int, bias: Sequence[str]
) -> tuple[str, dict[str, Tensor], list[str]]:
    """Return the kind of the tensor of a layer, its parts by their names in it, and the names of the factors."""
    names = [f"weight.factors.factor_{k}" for k in range(modes)]
    extra = [name for name in ("weight.weights", "weight.core") if name in tensors]
    lasso = [name for name in tensors if name.startswith("weight.lasso_weights")]
    if sorted(tensors) != sorted([*names, *extra, *lasso, *bias]):
        raise ArgumentError(
            f"the state dict has {sorted(tensors) or 'nothing'} for this layer{'' if bias else ' without a bias'}, and "
            f"TensorLy-Torch 0.5 writes {_KEYS}. Load it with the version that wrote it, into an equal layer, and pass "
            "that to fxfact.nn.from_tltorch."
        )
    kind = {"weight.weights": "CPTensor", "weight.core": "TuckerTensor"}.get("".join(extra), "TTTensor")
    own = {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}
    return kind, own, [name.removeprefix("weight.") for name in names]


def _dense_weight(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the weight that TensorLy-Torch holds as a dense tensor, for a convolution of PyTorch."""
    spec = module.spec if isinstance(module, ConvNd) else spec_of(module) if is_conv(module) else None
    if spec is None or spec.weight_shape != tuple(weight.shape):
        raise ArgumentError(f"the state dict has a dense kernel {tuple(weight.shape)}, and the module is {module}")
    return weight


def _load_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict if it has the keys and shapes of the model, or raise ArgumentError before it is changed."""
    expected, found = ({key: str(tuple(value.shape)) for key, value in d.items()} for d in (model.state_dict(), state))
    if expected != found:
        differences = first_differences("the model", expected, "the state dict", found)
        raise ArgumentError(f"the state dict does not fit the model. {differences}")
    model.load_state_dict(dict(state))
