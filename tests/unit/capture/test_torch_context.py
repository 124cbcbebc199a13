"""What surrounds calls in forward and leaves no node in a graph: such a model is captured by its modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

import fxfact
from fxfact.errors import CaptureError
from tests.support import Small, factorized


class Surrounded(Small):
    """Calls its second convolution in a context."""

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        with self.context():
            x = torch.relu(self.second(x))
        return self.head(x.mean((2, 3)))


class Double(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.relu else result


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def restored(change: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(before)


SAVED = "sets hooks for saved tensors"
SETTING = "changes settings of PyTorch"
CONTEXTS: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "saved_tensors_hooks": (SAVED, lambda: saved_tensors_hooks(lambda t: t, lambda t: t)),
    "save_on_cpu": (SAVED, save_on_cpu),
    "disable_saved_tensors_hooks": (SAVED, lambda: disable_saved_tensors_hooks("no hooks here")),
    "cudnn.flags": (SETTING, lambda: torch.backends.cudnn.flags(enabled=False)),
    "mkldnn.flags": (SETTING, lambda: torch.backends.mkldnn.flags(enabled=False)),
    "nnpack.flags": (SETTING, lambda: torch.backends.nnpack.flags(enabled=False)),
    "opt_einsum.flags": (SETTING, lambda: torch.backends.opt_einsum.flags(enabled=False)),
    "sdpa_kernel": (SETTING, lambda: sdpa_kernel(SDPBackend.MATH)),
    "matmul precision": (SETTING, lambda: restored(torch.set_float32_matmul_precision, "high", "highest")),
    "deterministic": (SETTING, lambda: restored(torch.use_deterministic_algorithms, True, False)),
    "mha fast path": (SETTING, lambda: restored(torch.backends.mha.set_fastpath_enabled, False, True)),
    "number of threads": (SETTING, lambda: restored(torch.set_num_threads, 1, torch.get_num_threads())),
    "default dtype": (SETTING, default_dtype),
    "anomaly mode": (SETTING, lambda: torch.autograd.set_detect_anomaly(True, check_nan=False)),
    "inference mode": ("gradients off", torch.inference_mode),
    "enable_grad": ("gradients on", torch.enable_grad),
    "no_grad": ("gradients off", torch.no_grad),
    "autocast": ("autocast", lambda: torch.autocast("cpu", enabled=False)),
    "torch.device": ("mode", lambda: torch.device("cpu")),
    "a function mode": ("mode", Double),
    "a dispatch mode": ("mode", Watching),
    "a flop counter": ("mode", lambda: FlopCounterMode(display=False)),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_context_that_a_graph_would_lose_is_kept(image: Tensor, name: str) -> None:
    words, context = CONTEXTS[name]
    model = Surrounded(context).eval()
    if name == "inference mode":
        model.requires_grad_(False)
    with pytest.raises(CaptureError, match=words):
        fxfact.plan(model, example_inputs=image, capture="trace")
    plan = fxfact.plan(model, example_inputs=image)
    assert (plan.capture, len(plan.rewrites)) == ("modules", 2)
    assert words in plan.refused[0]


def test_context_that_changes_nothing_that_a_graph_runs_is_accepted(image: Tensor) -> None:
    for context in (lambda: torch.profiler.record_function("second"), warnings.catch_warnings):
        assert fxfact.plan(Surrounded(context), example_inputs=image).capture == "trace"


def test_setting_that_forward_leaves_changed_is_noticed_in_every_capture(image: Tensor) -> None:
    class Tuning(Small):
        def forward(self, x: Tensor) -> Tensor:
            torch.backends.cudnn.benchmark = True
            return super().forward(x)

    class Last(Small):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            torch.backends.cudnn.deterministic = True
            return x

    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        for model, setting in ((Tuning(), "benchmark"), (Last(), "deterministic")):
            for _ in range(2):  # the first capture runs forward, and so changes the setting
                plan = fxfact.plan(model, example_inputs=image)
                assert plan.capture == "modules"
                assert setting in plan.refused[0]
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


def test_context_of_the_caller_is_no_change(image: Tensor) -> None:
    contexts = [
        CONTEXTS[name][1] for name in ("save_on_cpu", "no_grad", "cudnn.flags", "torch.device", "a dispatch mode")
    ]
    for context in contexts:
        with context():
            assert fxfact.plan(Small(), example_inputs=image).capture == "trace"


def test_setting_that_another_thread_changes_is_no_change_of_forward(image: Tensor) -> None:
    class Waiting(Small):
        def forward(self, x: Tensor) -> Tensor:
            import threading  # noqa: PLC0415

            precision = torch.get_float32_matmul_precision()
            other = threading.Thread(target=torch.set_float32_matmul_precision, args=(precision,))
            other.start()
            other.join()
            return super().forward(x)

    assert fxfact.plan(Waiting(), example_inputs=image).capture == "trace"


# Checkpoints keep fewer values for the backward pass. The factorized network must keep as few.


class Checkpointed(nn.Module):
    def __init__(self, way: str, order: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[order - 1]
        pairs = [(conv(8, 8, 3, padding=1), conv(8, 8, 3, padding=1)) for _ in range(4)]
        self.way, self.blocks = way, nn.ModuleList(nn.Sequential(one, nn.ReLU(), two) for one, two in pairs)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "sequential":
            return checkpoint_sequential(nn.Sequential(*self.blocks), 2, x, use_reentrant=False)
        for block in self.blocks:
            if self.way == "none":
                x = block(x)
            elif self.way == "method":
                x = checkpoint(block.forward, x, use_reentrant=False)
            else:
                x = checkpoint(block, x, use_reentrant=self.way == "reentrant")
        return x


def saved_values(network: nn.Module, x: Tensor) -> int:
    """Count the values that the backward pass needs, without parameters."""
    own, sizes = {parameter.data_ptr() for parameter in network.parameters()}, [0]

    def pack(tensor: Tensor) -> Tensor:
        sizes[0] += 0 if tensor.data_ptr() in own else tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x.clone().requires_grad_())
    return sizes[0]


@pytest.mark.parametrize(
    ("way", "order"), [("reentrant", 2), ("no", 1), ("no", 2), ("no", 3), ("sequential", 2), ("method", 2)]
)
def test_checkpoints_are_kept(way: str, order: int) -> None:
    x = torch.randn(2, 8, *[6] * order)
    model = Checkpointed(way, order).train()
    result = factorized(model, x)
    assert fxfact.plan_of(result).capture == "modules"
    assert len(fxfact.plan_of(result).rewrites) == 8
    if way != "sequential":
        assert saved_values(result, x) == saved_values(model, x)
    checkpointed = saved_values(result, x)
    result.way = "none"
    assert checkpointed < saved_values(result, x)
    reason = fxfact.plan_of(result).refused[0]
    assert "autograd.Function" in reason if way == "reentrant" else "checkpoint" in reason
