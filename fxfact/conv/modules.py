"""Convolutions as modules: reads ``nn.Conv``, ``nn.ConvTranspose`` and ``nn.Linear`` as ConvLayer, and writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxfact.conv.chain import ConvLayer, compose_weights
from fxfact.conv.conv_nd import ConvNd
from fxfact.conv.convolve import from_torch, takes_output_size, to_torch
from fxfact.conv.kernels import PLAIN_TYPES
from fxfact.conv.site import Skip
from fxfact.conv.spec import ConvSpec, pad_amounts, torch_padding
from fxfact.errors import ArgumentError, SpecError

CONV_TYPES: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_TYPES: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV_AND_TRANSPOSED_TYPES = CONV_TYPES + TRANSPOSED_TYPES
_TORCH_TYPES = (*_CONV_AND_TRANSPOSED_TYPES, nn.Linear)
_IN_OUT_LINEAR = ("transformers.pytorch_utils", "Conv1D")  # a linear layer whose weight is (in, out)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_PADS: dict[str, tuple[type[nn.Module], ...]] = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def is_conv(module: nn.Module) -> bool:
    """Whether the module is a convolution of PyTorch, transposed or not, a linear layer, or of a subclass."""
    return is_conv_class(type(module))


def is_conv_class(kind: type) -> bool:
    """Whether a class is one of PyTorch's convolutions, transposed or not, of linear layers, or a subclass."""
    return issubclass(kind, _TORCH_TYPES) or any(map(_is_in_out_linear, kind.__mro__))


def torch_conv_class(kind: type) -> type[nn.Module]:
    """Return the class of PyTorch, or of the Transformers library, that a class of convolutions derives from."""
    return next(base for base in kind.__mro__ if base in _TORCH_TYPES or _is_in_out_linear(base))


def _is_in_out_linear(kind: type) -> bool:
    """Whether a class is the Transformers library's ``Conv1D``, which is not imported here."""
    return (kind.__module__, kind.__name__) == _IN_OUT_LINEAR


def insert_base(kind: type, addition: type, prefix: str) -> type:
    """Return a class like ``kind`` whose ``super().forward`` calls that of ``addition`` instead of PyTorch's.

    A class of ``PLAIN_TYPES``, which computes the same differently, is replaced by PyTorch's class first.
    """
    base, kind = torch_conv_class(kind), PLAIN_TYPES.get(kind, kind)
    body = {"__module__": addition.__module__}
    inserted = type(f"{prefix}{base.__name__}", (addition, base), body)
    return inserted if kind is base else type(f"{prefix}{kind.__name__}", (kind, inserted), body)


def overrides_conv_forward(kind: type) -> bool:
    """Whether a class of convolutions replaces ``_conv_forward``, which PyTorch's ``forward`` calls."""
    return getattr(kind, "_conv_forward", None) is not getattr(torch_conv_class(kind), "_conv_forward", None)


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has forward or backward hooks, which run when it is called."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)


_HAS_HOOKS = "it has hooks, which a factorized convolution would lose"
ATTENTION_ADVICE = (
    "nn.MultiheadAttention computes its projections by a function: factorize the copy that split_attention of "
    "fxfact.nn makes"
)
FOLD_ADVICE = ": fold_weights=True folds those of torch.nn.utils"  # in reasons, while it was not passed


def read_conv(module: nn.Module) -> ConvLayer | Skip:
    """Return the convolution that the module computes, with the module's tensors, or a Skip if it is not plain."""
    if type(module) is ConvNd:
        reason = _HAS_HOOKS if has_hooks(module) else why_weight_unsupported(module.weight)
        return Skip(reason) if reason else ConvLayer(module.spec, from_torch(module.spec, module.weight), module.bias)
    if reason := why_unsupported(module):
        return Skip(reason)
    if list(module.children()) or {*module._parameters, *module._buffers} - {"weight", "bias"}:
        return Skip("it holds modules or tensors of its own, which a chain would lose")
    spec = spec_of(module)
    return ConvLayer(spec, from_torch(spec, cast(Tensor, module.weight)), cast("Tensor | None", module.bias))


def why_unsupported(module: nn.Module) -> str:
    """Return why the module is not a plain convolution that can be decomposed, or "" if it is."""
    kind = type(module)
    if not is_conv(module):
        return f"{kind.__name__} is not a convolution"
    if reason := why_state_unsupported(module):
        return reason
    if kind not in PLAIN_TYPES and kind is not torch_conv_class(kind):
        name = f"{kind.__module__}.{kind.__qualname__}"
        return f"{name} is a subclass of {torch_conv_class(kind).__name__} that may compute something else"
    return _HAS_HOOKS if has_hooks(module) else ""


def why_state_unsupported(module: nn.Module) -> str:
    """Return why a convolution module does not compute what its attributes say, or "" if it does."""
    if kind := next((base for base in type(module).__mro__ if base.__module__.startswith("torch.ao.")), None):
        name = f"{kind.__module__}.{kind.__qualname__}"
        return f"{name} quantizes its weight: factorize the model before you prepare it for quantization"
    if computes_weight(module):
        return f"its weight or bias is computed from other parameters{FOLD_ADVICE}"
    if {"forward", "_conv_forward"} & set(vars(module)):
        return "its forward was replaced on this instance"
    if module._state_dict_hooks or module._state_dict_pre_hooks or module._load_state_dict_pre_hooks:
        return "it has hooks on its state_dict, which a factorized convolution would lose"
    return why_weight_unsupported(cast(Tensor, module.weight)) or _why_inconsistent(module)


def why_weight_unsupported(weight: Tensor) -> str:
    """Return why a weight of this type, dtype or layout cannot be decomposed, or "" if it can."""
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in _DTYPES or weight.is_quantized:
        return f"its weight is {weight.dtype}, but only float16, bfloat16, float32 and float64 can be decomposed"
    return "" if weight.layout == torch.strided else f"its weight is {weight.layout}, not strided"


def _why_inconsistent(module: nn.Module) -> str:
    """Return which attribute of a convolution contradicts the others, or "" if none does."""
    try:
        spec = spec_of(module)
    except SpecError as error:
        return str(error)
    found = tuple(cast(Tensor, module.weight).shape)
    if found != spec.torch_weight_shape:
        return f"its attributes describe a weight of {spec.torch_weight_shape}, but its weight is {found}"
    amounts = getattr(module, "_reversed_padding_repeated_twice", ())
    if spec.padding_mode != "zeros" and list(amounts) != pad_amounts(spec.padding):
        return f"its padding was changed after construction, but padding_mode={spec.padding_mode!r} uses the old one"
    return ""


def computes_weight(module: nn.Module) -> bool:
    """Whether a parametrization or a hook computes the weight or bias of a convolution from other parameters."""
    bias_is_computed = getattr(module, "bias", None) is not None and module._parameters.get("bias") is None
    plain = isinstance(module._parameters.get("weight"), nn.Parameter) and not bias_is_computed
    return hasattr(module, "parametrizations") or not plain


def spec_of(module: nn.Module) -> ConvSpec:
    """Return the spec that the attributes of an ``nn.Conv`` or a linear layer describe. Raises SpecError."""
    bias: bool = module.bias is not None
    if isinstance(module, nn.Linear):
        return ConvSpec.linear(module.in_features, module.out_features, bias=bias)
    if _is_in_out_linear(torch_conv_class(type(module))):
        sizes: Any = module
        return ConvSpec.linear(sizes.nx, sizes.nf, bias=bias, transposed=True)
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
        bias=bias,
    )


def write_conv(spec: ConvSpec, weight: Tensor, bias: Tensor | None = None) -> list[nn.Module]:
    """Return ordinary PyTorch modules that compute a convolution with these tensors.

    The result is one ``nn.Conv`` module, an ``nn.Linear``, or with more than three axes a ``ConvNd``. Asymmetric
    padding that is not ``'same'`` needs a pad module before an ``nn.Conv``.

    Args:
        spec: The spec of the convolution.
        weight: A parameter in PyTorch's layout, which the module takes over, or a tensor
            ``(out, in / groups, *kernel)``. A tensor becomes a parameter with the same ``requires_grad``, and shares
            its memory if both layouts are equal.
        bias: The bias ``(out,)``, or None.
    """
    if not spec.order:
        return [_write_linear(spec, weight, bias)]
    parameter = _as_parameter(weight if isinstance(weight, nn.Parameter) else to_torch(spec, weight))
    own_bias = None if bias is None else _as_parameter(bias)
    if spec.order > 3:
        return [ConvNd.holding(spec, parameter, own_bias)]
    pads: list[nn.Module] = []
    padding: str | int | tuple[int, ...] | None = torch_padding(spec)
    mode = spec.padding_mode
    if padding is None:
        amounts = pad_amounts(spec.padding)
        pad = _PADS[mode][spec.order - 1]
        pads, padding, mode = [pad(amounts[0] if len(set(amounts)) == 1 else tuple(amounts))], 0, "zeros"
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
    module.weight = parameter
    if own_bias is not None:
        module.bias = own_bias
    return [*pads, module]


def write_conv_module(spec: ConvSpec, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Return what ``write_conv`` returns as one module: an ``nn.Sequential`` if a pad module is needed."""
    modules = write_conv(spec, weight, bias)
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _write_linear(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return the ``nn.Linear`` for a linear layer, whichever layout its parameter has."""
    module = nn.Linear(spec.in_channels, spec.out_channels, bias=bias is not None, device="meta")
    if isinstance(weight, nn.Parameter) and spec.transposed:
        weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
    module.weight = _as_parameter(weight)
    if bias is not None:
        module.bias = _as_parameter(bias)
    return module


def run_stages(
    stages: Iterable[Any], spec: ConvSpec, input: Tensor, output_size: Sequence[int] | None = None
) -> Tensor:
    """Run the modules of a chain that equals a convolution with this spec.

    Args:
        stages: The modules, in order. There may be functions that keep the size between them.
        spec: The spec of the convolution.
        input: The input, as ``fxfact.conv.run`` takes it.
        output_size: The size of the output that a transposed convolution returns, as its ``forward`` takes it.

    Raises:
        ArgumentError: If the convolution is not transposed, or cannot return an output of this size.
    """
    if not takes_output_size(output_size, spec):
        for stage in stages:
            input = stage(input)
        return input
    for stage in stages:
        if isinstance(stage, nn.Module) and getattr(stage, "transposed", False):
            axes = enumerate(decides_size(stage), start=-spec.order)
            input = stage(input, [output_size[axis] if decides else input.shape[axis] for axis, decides in axes])
        else:
            input = stage(input)
    wanted = output_size[-spec.order :]
    if isinstance(wanted, Sequence) and tuple(input.shape[-spec.order :]) != tuple(wanted):
        raise ArgumentError(f"output_size={tuple(wanted)} is not possible: the output is {tuple(input.shape)}")
    return input


def decides_size(stage: nn.Module) -> tuple[bool, ...]:
    """Return for each spatial axis whether a transposed stage of a chain works along it, and so decides its size."""
    assert isinstance(stage, nn.modules.conv._ConvNd | ConvNd)
    axes = zip(stage.kernel_size, stage.stride, stage.padding, strict=True)
    return tuple(k > 1 or s > 1 or p != 0 for k, s, p in axes)


def write_chain(
    specs: Sequence[ConvSpec], weights: Sequence[Tensor], bias: Tensor | None, *, like: Tensor
) -> list[nn.Module]:
    """Return the modules of ``write_conv`` for every stage. The last stage has the bias.

    New parameters get the memory format and ``requires_grad`` of ``like``, the dense weight in PyTorch's layout.
    """
    modules: list[nn.Module] = []
    for spec, weight, stage_bias in zip(specs, weights, [None] * (len(specs) - 1) + [bias], strict=True):
        parameter = weight if isinstance(weight, nn.Parameter) else _parameter_like(to_torch(spec, weight), like)
        modules += write_conv(spec, parameter, stage_bias)
    return modules


def compose_modules(specs: Sequence[ConvSpec], stages: Iterable[nn.Module]) -> Tensor:
    """Compute the dense kernel (out, in / groups, *kernel) of modules from ``write_chain``. torch.fx can trace it.

    Pad modules do not change the kernel and are skipped.
    """
    weights = [stage.weight for stage in stages if hasattr(stage, "weight")]
    kernels = [from_torch(spec, cast(Tensor, weight)) for spec, weight in zip(specs, weights, strict=True)]
    return compose_weights(specs, kernels)


def _parameter_like(weight: Tensor, like: Tensor) -> nn.Parameter:
    """Return a parameter with the memory format of ``like`` and the strides of a new tensor.

    PyTorch chooses the format to compute in by the strides, even those of a 1×1 kernel, where others would be valid.
    """
    old, new = weight.detach(), torch.empty_like(weight, memory_format=memory_format_of(like), requires_grad=False)
    return nn.Parameter(old if old.stride() == new.stride() else new.copy_(old), requires_grad=like.requires_grad)


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


def memory_format_of(weight: Tensor) -> torch.memory_format:
    """Return the memory format of a weight. A weight that fits both is contiguous."""
    last = CHANNELS_LAST.get(weight.ndim, torch.contiguous_format)
    channels_last = weight.is_contiguous(memory_format=last) and not weight.is_contiguous()
    return last if channels_last else torch.contiguous_format
