"""Writes a dense weight to the stages of a chain, where they can express it.

A scaling of output channels is applied to the last stage, and one of input channels to the first. Any other change
raises WeightError, because the stages cannot express it in general.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfact.conv.chain import compose_weights
from fxfact.conv.channel_gains import channel_gains
from fxfact.conv.convolve import from_torch, to_torch
from fxfact.conv.modules import compose_modules, computes_weight
from fxfact.conv.spec import ConvSpec
from fxfact.errors import WeightError


@dataclass(frozen=True)
class ComposedChain:
    """The stages of a layer.

    Attributes:
        dense: The convolution that the layer computes.
        specs: The specs of the stages.
        convs: The convolutions among the modules of the stages, by their names in the layer.
    """

    dense: ConvSpec
    specs: tuple[ConvSpec, ...]
    convs: Mapping[str, Any]

    @property
    def last(self) -> Any:
        """The last convolution, which has the bias."""
        return list(self.convs.values())[-1]


class StagedLayer(nn.Module):
    """Base of a layer that holds the stages of a chain in place of a dense weight."""

    _weight_in_torch_layout = True
    _shared_names: tuple[str, ...] = ()  # of stages whose weights other layers hold too

    def _chain(self) -> ComposedChain:
        raise NotImplementedError

    def _composed(self) -> Tensor:
        """Return the kernel as ``weight`` has it, as a plain tensor."""
        chain = self._chain()
        kernel = compose_modules(chain.specs, chain.convs.values())
        return to_torch(chain.dense, kernel) if self._weight_in_torch_layout else kernel


def refusal(layer: StagedLayer, why: str) -> WeightError:
    """Return the error for a write to a layer that its stages cannot express."""
    path, kind = getattr(layer, "_path", ""), type(layer).__name__
    names = ", ".join(layer._chain().convs)
    dense = "to_conv(), an ordinary convolution" if layer._chain().dense.order else "to_linear(), an ordinary layer"
    return WeightError(
        f"{f'{path} ({kind})' if path else kind}: {why}. This layer is the chain of its stages {names}, and nothing in "
        f"it was changed. Put layer.{dense}, in its place first; or write to the stages; or change the model before "
        "you factorize it."
    )


def write_weight(layer: StagedLayer, values: Any, *, keep_parameters: bool) -> None:
    """Change the stages so that they compose to other values.

    Args:
        layer: The layer.
        values: The new kernel, in the layout of ``layer.weight``. The stages get its dtype and device.
        keep_parameters: Whether to write to the parameters of the stages. Otherwise the stages get new parameters, with
            the ``requires_grad`` of ``values``.

    Raises:
        WeightError: If the stages cannot express the values. Then nothing has changed.
    """
    chain = layer._chain()
    if not isinstance(values, Tensor):
        raise refusal(layer, f"its weight must be a tensor, got {type(values).__name__}")
    with as_parameters(layer), torch._C.DisableTorchFunctionSubclass():
        weights = _stage_weights(layer, chain, values)
        if keep_parameters:
            _check_unshared(layer, dict(zip(chain.convs, weights, strict=True)))
        else:
            layer._shared_names = ()
        for conv, weight in zip(chain.convs.values(), weights, strict=True):
            old = conv.weight
            if isinstance(conv, StagedLayer):
                write_weight(conv, weight.requires_grad_(values.requires_grad), keep_parameters=keep_parameters)
            elif not keep_parameters:
                conv.weight = nn.Parameter(weight, requires_grad=values.requires_grad)
            elif (old.dtype, old.device) != (weight.dtype, weight.device):
                old.data = weight
            elif not old.equal(weight):
                old.copy_(weight)


def _check_unshared(layer: StagedLayer, weights: Mapping[str, Tensor]) -> None:
    """Raise WeightError if the weight of a stage would change that other layers hold too."""
    for name in layer._shared_names:
        if not layer._chain().convs[name].weight.to(weights[name]).equal(weights[name]):
            raise refusal(layer, f"the other layers of its joint set hold the weight of its stage {name} too")


def _stage_weights(layer: StagedLayer, chain: ComposedChain, values: Tensor) -> list[Tensor]:
    """Return new weights of the stages that compose to these values. Raises WeightError."""
    before, convs = layer._composed(), list(chain.convs.values())
    if before.shape != values.shape:
        raise refusal(layer, f"its weight has the shape {tuple(before.shape)}, not {tuple(values.shape)}")
    if name := next((n for n, c in chain.convs.items() if is_computed(c)), None):
        raise refusal(layer, f"its stage {name} computes its weight from other parameters")
    if before.is_meta or values.is_meta:
        if before.is_meta and values.is_meta:
            return [conv.weight for conv in convs]
        raise refusal(layer, "values cannot be written from or to the meta device")
    if len(convs) == 1:
        return [_like(convs[0].weight, values, values)]
    if not bool(values.isfinite().all()):
        raise refusal(layer, "the values written to its weight contain NaN or Inf")
    gains = _gains(layer, chain, before, values)
    if gains is None:
        raise refusal(
            layer,
            "its stages cannot express what was written to its weight. They can only express a scaling of whole output "
            "or input channels",
        )
    kernels = [from_torch(spec, conv.weight.double().cpu()) for spec, conv in zip(chain.specs, convs, strict=True)]
    one = kernels[0].new_ones(())
    factors = [_per_input(chain.specs[0], gains[1]), *[one] * (len(convs) - 2), _per_output(chain.specs[-1], gains[0])]
    weights = []
    for spec, conv, kernel, factor in zip(chain.specs, convs, kernels, factors, strict=True):
        weight = _like(conv.weight, to_torch(spec, kernel * factor), values)
        difference = (from_torch(spec, weight.double().cpu()) - kernel * factor).abs()
        if not bool((difference <= torch.finfo(weight.dtype).eps * kernel.abs().amax() * factor.abs()).all()):
            raise refusal(layer, f"the scaled values of a stage leave the range of {weight.dtype}")
        weights.append(weight)
    return weights


def _gains(layer: StagedLayer, chain: ComposedChain, before: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the channel gains that turn the weight into these values, or None."""
    dense = chain.dense

    def as_kernel(weight: Tensor) -> Tensor:
        weight = weight.double().cpu()
        return from_torch(dense, weight) if layer._weight_in_torch_layout else weight

    old, new = as_kernel(before), as_kernel(values.detach())
    infos = [torch.finfo(tensor.dtype) for tensor in (before, values)]
    info = max(infos, key=lambda found: found.eps)
    absolute = [
        from_torch(s, c.weight.double().cpu()).abs() for s, c in zip(chain.specs, chain.convs.values(), strict=True)
    ]
    summed = min(info.eps, torch.finfo(torch.float32).eps)  # halves are summed in float32
    rounding = info.eps * (old.abs() + info.smallest_normal) + summed * compose_weights(chain.specs, absolute)
    return channel_gains(dense, old, new, rounding)


def _per_output(spec: ConvSpec, gains: Tensor) -> Tensor:
    """Return gains of output channels (out,) in a shape that broadcasts with a kernel (out, in / groups, *kernel)."""
    return gains.reshape(-1, 1, *[1] * spec.order)


def _per_input(spec: ConvSpec, gains: Tensor) -> Tensor:
    """Return gains of input channels (in,) in a shape that broadcasts with a kernel (out, in / groups, *kernel)."""
    of_group = gains.reshape(spec.groups, 1, -1).expand(-1, spec.out_channels // spec.groups, -1)
    return of_group.reshape(spec.out_channels, -1, *[1] * spec.order)


def _like(weight: Tensor, new: Tensor, values: Tensor) -> Tensor:
    """Return a copy of ``new`` with the strides of a stage's weight, and the dtype and device of ``values``."""
    return torch.empty_like(weight, dtype=values.dtype, device=values.device, requires_grad=False).copy_(new)


def is_computed(conv: nn.Module) -> bool:
    """Whether a stage computes its weight from other parameters, and not from stages of its own."""
    return computes_weight(conv) and not isinstance(conv, StagedLayer)


def stage_parameters(layer: StagedLayer) -> Iterator[Tensor]:
    """Yield the weights of the stages, of those inside a stage too."""
    for conv in layer._chain().convs.values():
        yield from stage_parameters(conv) if isinstance(conv, StagedLayer) else [conv.weight]


@contextmanager
def as_parameters(layer: StagedLayer) -> Iterator[None]:
    """Compute tensors with the dtype of the parameters, without gradients, and that can be written to later."""
    device = next(stage_parameters(layer)).device
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
