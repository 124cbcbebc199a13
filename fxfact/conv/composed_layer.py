"""The base of layers whose weight and bias are read and written as those of a convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxfact.conv.composed_weight import ComposedWeight, linked_weight
from fxfact.conv.stage_writes import StagedLayer, is_computed, refusal, write_weight


class ComposedLayer(StagedLayer):
    """Base of a layer whose ``weight`` is composed from its stages."""

    def _has_bias(self, bias: bool) -> None:
        """Record whether the last stage has a bias."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense kernel, composed at every access.

        Scaling its channels in place scales the stages. Other writes raise WeightError. A compiled function that takes
        it as an argument needs a clone.
        """
        return linked_weight(self)

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), which the last stage adds."""
        own = self._parameters.get("bias")  # of a forward that adds it after the convolution
        bias: Tensor | None = self._chain().last.bias if own is None else own
        return bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            write_weight(self, value, keep_parameters=isinstance(value, ComposedWeight))
        elif name == "bias":
            self._write_bias(value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter. 'weight' and 'bias' are written to the stages."""
        if name in ("weight", "bias"):
            setattr(self, name, param)
        elif isinstance(param, ComposedWeight) or (param is not None and param is self.bias):
            raise refusal(self, f"{name} cannot take the place of a tensor that its stages hold")
        else:
            super().register_parameter(name, param)

    def _write_bias(self, value: Any) -> None:
        if value is not None and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value) if isinstance(value, Tensor) else value
        chain = self._chain()
        if isinstance(value, Tensor) and tuple(value.shape) != (chain.dense.out_channels,):
            raise refusal(self, f"its bias has the shape {(chain.dense.out_channels,)}, not {tuple(value.shape)}")
        if is_computed(chain.last):
            raise refusal(self, "its last stage computes its weight or bias from other parameters")
        if self._parameters.get("bias") is not None:
            self._parameters["bias"] = value
            return
        chain.last.bias = value
        self._has_bias(value is not None)


class OwnParameters(dict[str, Any]):
    """The parameters that a composed layer holds itself, with its weight and bias for code that looks them up here.

    ``torch.nn.utils`` does so before it replaces them by computed ones, which is refused.
    """

    layer: ComposedLayer | None = None

    def __init__(self, layer: ComposedLayer, parameters: Mapping[str, Any]) -> None:
        super().__init__(parameters)
        self.layer = layer

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return OwnParameters.__new__, (OwnParameters,), (self.layer, dict(self))

    def __setstate__(self, state: tuple[ComposedLayer, dict[str, Any]]) -> None:
        self.layer = state[0]
        self.update(state[1])

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or self._is_of_stages(name)

    def __missing__(self, name: str) -> Any:
        if not self._is_of_stages(name):
            raise KeyError(name)
        return getattr(self.layer, name)

    def __setitem__(self, name: str, value: Any) -> None:
        if self.layer is not None and name in ("weight", "bias") and not super().__contains__(name):
            raise refusal(self.layer, f"its {name} is no parameter that another tensor can replace")
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        if self.layer is not None and self._is_of_stages(name):
            raise refusal(self.layer, f"its {name} cannot be removed or computed from other parameters")
        super().__delitem__(name)

    def _is_of_stages(self, name: object) -> bool:
        if self.layer is None or name not in ("weight", "bias") or super().__contains__(name):
            return False
        return name == "weight" or self.layer.bias is not None
