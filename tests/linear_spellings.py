"""Linear layers as modules and as functions, in the ways in which models spell them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


class Own(nn.Linear):
    """A subclass that calls the function with its own weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.relu(), self.weight, self.bias) + 1


class Conv1D(nn.Module):
    """The Transformers library's linear layer, whose weight is (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf, self.nx = outputs, inputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[:-1] + (self.nf,)  # noqa: RUF005 (torch.fx cannot iterate over a proxy)
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).reshape(size)


Conv1D.__module__ = "transformers.pytorch_utils"


class Spelled(nn.Module):
    """A function of a weight and a bias that the module itself holds."""

    def __init__(self, function: Callable[..., Tensor], inputs: int, outputs: int, *, in_out: bool) -> None:
        super().__init__()
        self.function = function
        self.kernel = nn.Parameter(torch.randn(*((inputs, outputs) if in_out else (outputs, inputs))) / inputs**0.5)
        self.shift = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.kernel, self.shift)


class Net(nn.Module):
    """The layer between two others."""

    def __init__(self, layer: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, inputs), layer, nn.Linear(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(torch.tanh(self.first(x)))))


MODULES: dict[str, Callable[[int, int], nn.Module]] = {
    "Linear": nn.Linear,
    "Linear without bias": lambda i, o: nn.Linear(i, o, bias=False),
    "NonDynamicallyQuantizableLinear": NonDynamicallyQuantizableLinear,
    "subclass": Own,
    "Conv1D": Conv1D,
}
FUNCTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "F.linear": lambda i, o: Spelled(F.linear, i, o, in_out=False),
    "@ transposed": lambda i, o: Spelled(lambda x, w, b: x @ w.T + b, i, o, in_out=False),
    "matmul": lambda i, o: Spelled(lambda x, w, b: torch.matmul(x, w) + b, i, o, in_out=True),
    "matmul of a transpose": lambda i, o: Spelled(lambda x, w, b: x.matmul(w.transpose(0, 1)), i, o, in_out=False),
    "F.linear of a transpose": lambda i, o: Spelled(lambda x, w, b: F.linear(x, w.t(), b), i, o, in_out=True),
    "non-contiguous": lambda i, o: Spelled(
        lambda x, w, b: F.linear(x.transpose(0, 1), w, b).transpose(0, 1), i, o, in_out=False
    ),
}
