"""The counterparts of modules for maps with frames, along which all but convolutions do nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxfact.conv import is_conv
from fxfact.errors import FxfactError
from fxfact.nn import FactorizedConv, transduct_conv

_ANY_ORDER: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.AlphaDropout,
    nn.GroupNorm,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Tanh,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Softplus,
    nn.Softsign,
    nn.Threshold,
)
_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: nn.BatchNorm3d,
    nn.InstanceNorm2d: nn.InstanceNorm3d,
}
_PADS: dict[type[nn.Module], type[nn.Module]] = {
    nn.ZeroPad2d: nn.ZeroPad3d,
    nn.ReflectionPad2d: nn.ReflectionPad3d,
    nn.ReplicationPad2d: nn.ReplicationPad3d,
    nn.CircularPad2d: nn.CircularPad3d,
}


@dataclass(frozen=True)
class TimeKernel:
    """How convolutions get an axis of frames.

    Attributes:
        size: the size of the kernel along the frames.
        train_all: whether all parameters are trained, or only the stages of factorized layers with the new axis.
    """

    size: int
    train_all: bool


def module_3d(module: nn.Module, time: TimeKernel) -> nn.Module | None:
    """Return the module for maps with an axis of frames, or None if there is none."""
    kind: Any = type(module)
    if isinstance(module, FactorizedConv):
        return module.transduct(time.size, train_all=time.train_all) if module.order == 2 else None
    if is_conv(module):
        return _conv_3d(module, time)
    if kind in _ANY_ORDER:
        return copy.deepcopy(module)
    made = _norm_3d(module) if kind in _NORMS else _MAKERS.get(kind, _no_counterpart)(module)
    return None if made is None else made.train(module.training)


def _conv_3d(conv: Any, time: TimeKernel) -> nn.Module | None:
    """Return the convolution with frames. In a chain only the stage along the first spatial axis sees other frames."""
    if len(getattr(conv, "kernel_size", ())) != 2:
        return None
    try:
        made = transduct_conv(conv, time.size if conv.kernel_size[0] > 1 else 1)
    except FxfactError:
        return None
    return made if time.train_all else made.requires_grad_(False)


def _norm_3d(norm: Any) -> nn.Module:
    new = _NORMS[type(norm)](
        norm.num_features,
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        track_running_stats=norm.track_running_stats,
    )
    own = copy.deepcopy(norm)
    new._parameters, new._buffers = own._parameters, own._buffers
    return new


def with_frames(value: Any, neutral: Any) -> tuple[Any, ...]:
    """Return a setting for (height, width), or for both, with the neutral value for the frames before it."""
    return (neutral, *(value if isinstance(value, tuple | list) else (value, value)))


def _max_pool(pool: Any) -> nn.Module | None:
    if pool.return_indices:
        return None
    return nn.MaxPool3d(
        with_frames(pool.kernel_size, 1),
        with_frames(pool.stride, 1),
        with_frames(pool.padding, 0),
        with_frames(pool.dilation, 1),
        ceil_mode=pool.ceil_mode,
    )


def _avg_pool(pool: Any) -> nn.Module:
    return nn.AvgPool3d(
        with_frames(pool.kernel_size, 1),
        with_frames(pool.stride, 1),
        with_frames(pool.padding, 0),
        pool.ceil_mode,
        pool.count_include_pad,
        pool.divisor_override,
    )


def _upsample(module: Any) -> nn.Module | None:
    mode = upsampling_mode(module.mode)
    if module.scale_factor is None or mode is None:
        return None
    scale = with_frames(module.scale_factor, 1.0)
    return nn.Upsample(scale_factor=scale, mode=mode, align_corners=module.align_corners)


def upsampling_mode(mode: str) -> str | None:
    """Return the mode of interpolation that does the same to every frame, or None if PyTorch has none."""
    return {"nearest": "nearest", "nearest-exact": "nearest-exact", "bilinear": "trilinear"}.get(mode)


def _pad(pad: Any) -> nn.Module:
    return _PADS[type(pad)]((*pad.padding, 0, 0))


def _no_counterpart(module: nn.Module) -> None:
    return None


_MAKERS: dict[Any, Callable[[Any], nn.Module | None]] = {
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: lambda pool: nn.AdaptiveAvgPool3d(with_frames(pool.output_size, 1)),
    nn.AdaptiveMaxPool2d: lambda pool: (
        None if pool.return_indices else nn.AdaptiveMaxPool3d(with_frames(pool.output_size, 1))
    ),
    nn.Dropout2d: lambda dropout: nn.Dropout3d(dropout.p),
    nn.ConstantPad2d: lambda pad: nn.ConstantPad3d((*pad.padding, 0, 0), pad.value),
    nn.Upsample: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    nn.UpsamplingBilinear2d: _upsample,
    **dict.fromkeys(_PADS, _pad),
}
