"""``nn.Conv1d/2d/3d`` and their transposes to ConvLayer and back: the only place that knows what these modules take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxfact.conv.chain import ConvLayer, compose_weights, from_torch, to_torch
from fxfact.conv.kernels import ONEDNN_TYPES, PLAIN_TYPES, POINTWISE_TYPES
from fxfact.conv.site import Skip
from fxfact.conv.spec import ConvSpec, pad_amounts, same_padding
from fxfact.errors import SpecError

COMPUTED = "its weight or bias is computed from other parameters: fold_weights=True folds what torch.nn.utils computes"
CONV_TYPES: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_TYPES: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_PADS: dict[str, tuple[type[nn.Module], ...]] = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def is_conv(module: nn.Module) -> bool:
    """Whether the module is a convolution of PyTorch or a subclass of one, transposed or not."""
    return isinstance(module, CONV_TYPES + TRANSPOSED_TYPES)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)


def read_conv(module: nn.Module) -> ConvLayer | Skip:
    """The convolution that the module is, sharing its tensors; a Skip where its type or its hooks do more."""
    if reason := why_unsupported(module):
        return Skip(reason)
    assert isinstance(module, nn.modules.conv._ConvNd)
    spec = spec_of(module)
    return ConvLayer(spec, from_torch(spec, module.weight), module.bias)


def why_unsupported(module: nn.Module) -> str:
    """Why the module is not, or not only, a convolution that can be decomposed; empty where it is."""
    kind = type(module)
    if not is_conv(module):
        return f"{kind.__name__} is not a convolution"
    if reason := why_state_unsupported(module):
        return reason
    if kind not in {*CONV_TYPES, *TRANSPOSED_TYPES, *PLAIN_TYPES}:
        return f"{kind.__name__} is a subclass of {kind.__mro__[1].__name__} that may compute something else"
    if list(module.children()) or {*module._parameters, *module._buffers} - {"weight", "bias"}:
        return "it holds modules or tensors of its own, which a chain would displace"
    return "it has hooks, which a factorized convolution would lose" if has_hooks(module) else ""


def why_state_unsupported(module: nn.Module) -> str:
    """Why what a convolution holds is not, or not only, what its attributes describe; empty where it is."""
    if computes_weight(module):
        return COMPUTED
    if {"forward", "_conv_forward"} & set(vars(module)):
        return "its forward was replaced on this one module"
    if module._state_dict_hooks or module._state_dict_pre_hooks or module._load_state_dict_pre_hooks:
        return "it has hooks on its state_dict, which a factorized convolution would lose"
    return why_weight_unsupported(cast(Tensor, module.weight)) or _contradiction(module)


def why_weight_unsupported(weight: Tensor) -> str:
    """Why a weight is of a kind that cannot be decomposed; empty where it is not."""
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in _DTYPES or weight.is_quantized:
        return f"its weight is {weight.dtype}, which nothing is decomposed in"
    return "" if weight.layout == torch.strided else f"its weight is {weight.layout}, not strided"


def _contradiction(module: nn.Module) -> str:
    """What of a convolution's attributes does not fit the rest of it; empty where all does."""
    try:
        spec = spec_of(module)
    except SpecError as error:
        return str(error)
    found = tuple(cast(Tensor, module.weight).shape)
    first = (spec.in_channels, spec.out_channels // spec.groups)
    shape = (*first, *spec.kernel_size) if spec.transposed else spec.weight_shape
    if found != shape:
        return f"its attributes describe a weight of {shape}, but it has one of {found}"
    amounts = cast(Any, module)._reversed_padding_repeated_twice
    stale = spec.padding_mode != "zeros" and list(amounts) != pad_amounts(spec.padding)
    return "its padding was changed after it was made, which padding_mode does not follow" if stale else ""


def computes_weight(module: nn.Module) -> bool:
    """Whether a convolution's weight or bias is made from other parameters, by a parametrization or by a hook."""
    bias_elsewhere = getattr(module, "bias", None) is not None and module._parameters.get("bias") is None
    plain = isinstance(module._parameters.get("weight"), nn.Parameter) and not bias_elsewhere
    return hasattr(module, "parametrizations") or not plain


def spec_of(module: nn.Module) -> ConvSpec:
    """What the attributes of an ``nn.Conv`` describe, whatever its type and its hooks do besides. Raises SpecError."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    return ConvSpec.parse(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
        transposed=isinstance(module, TRANSPOSED_TYPES),
        output_padding=module.output_padding,
        bias=module.bias is not None,
    )


def write_conv(spec: ConvSpec, weight: Tensor, bias: Tensor | None = None) -> list[nn.Module]:
    """Ordinary modules for a convolution, holding these tensors.

    A parameter, which has PyTorch's layout, is kept as it is. Another tensor, which has ours, becomes one that keeps
    its requires_grad, and its memory where the layouts agree. ``padding`` becomes ints where it is symmetric,
    ``'same'`` where it says the same, else a pad module in front.
    """
    before: list[nn.Module] = []
    padding: str | int | tuple[int, ...] = tuple(pair[0] for pair in spec.padding)
    mode = spec.padding_mode
    if any(first != last for first, last in spec.padding):
        if set(spec.stride) == {1} and spec.padding == same_padding(spec.kernel_size, spec.dilation):
            padding = "same"
        else:
            amounts = pad_amounts(spec.padding)
            pad = _PADS[mode][spec.order - 1]
            before, padding, mode = [pad(amounts[0] if len(set(amounts)) == 1 else tuple(amounts))], 0, "zeros"
    kind: type = (TRANSPOSED_TYPES if spec.transposed else CONV_TYPES)[spec.order - 1]
    module = kind(
        spec.in_channels,
        spec.out_channels,
        spec.kernel_size,
        stride=spec.stride,
        padding=padding,
        dilation=spec.dilation,
        groups=spec.groups,
        bias=bias is not None,
        padding_mode=mode,
        device="meta",
        **({"output_padding": spec.output_padding} if spec.transposed else {}),
    )
    module.weight = _parameter(weight if isinstance(weight, nn.Parameter) else to_torch(spec, weight))
    if bias is not None:
        module.bias = _parameter(bias)
    return [*before, module]


def write_chain(
    specs: Sequence[ConvSpec], weights: Sequence[Tensor], bias: Tensor | None, *, like: Tensor
) -> list[nn.Module]:
    """``write_conv`` for every stage, the bias on the last; new parameters have the memory format and requires_grad of
    ``like``, the dense weight as PyTorch holds it.
    """
    modules: list[nn.Module] = []
    for spec, weight, own_bias in zip(specs, weights, [None] * (len(specs) - 1) + [bias], strict=True):
        kept = isinstance(weight, nn.Parameter)
        modules += write_conv(spec, weight if kept else _formatted(to_torch(spec, weight), like), own_bias)
    return modules


def compose_modules(specs: Sequence[ConvSpec], stages: Iterable[nn.Module]) -> Tensor:
    """The dense kernel (out, in / groups, *kernel) of modules that ``write_chain`` wrote; it can be traced.

    Pad modules, which move no kernel, are passed over.
    """
    weights = [stage.weight for stage in stages if hasattr(stage, "weight")]
    own = [from_torch(spec, cast(Tensor, weight)) for spec, weight in zip(specs, weights, strict=True)]
    return compose_weights(specs, own)


def _formatted(weight: Tensor, like: Tensor) -> nn.Parameter:
    """With the strides of a new tensor: by those of a 1×1 kernel too PyTorch chooses the format that it computes in."""
    own, new = weight.detach(), torch.empty_like(weight, memory_format=_format(like), requires_grad=False)
    return nn.Parameter(own if own.stride() == new.stride() else new.copy_(own), requires_grad=like.requires_grad)


def _parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


def _format(weight: Tensor) -> torch.memory_format:
    last = CHANNELS_LAST.get(weight.ndim, torch.contiguous_format)
    channels_last = weight.is_contiguous(memory_format=last) and not weight.is_contiguous()
    return last if channels_last else torch.contiguous_format
