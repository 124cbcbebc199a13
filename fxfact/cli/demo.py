"""The main job on real data: train a small network on handwritten digits, factorize it, show the difference."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from fxfact.analysis import diff
from fxfact.api import factorize, plan_of
from fxfact.api import plan as prepare
from fxfact.errors import FxfactError
from fxfact.factorizations import RankSpec
from fxfact.planning import FactorizationRequest
from fxfact.utils import side_by_side

Say = Callable[[str], None]


class DemoError(FxfactError, ValueError):
    """The demo cannot run here."""


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) scaled to 0 … 1 and labels (n,), to train on and held out."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))


class DigitNet(nn.Module):
    """A residual network for 8×8 images."""

    def __init__(self, channels: int = 96) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.block1 = Block(channels)
        self.widen = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.block2 = Block(2 * channels)
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 8, 8) to logits (batch, 10)."""
        x = self.block1(torch.relu(self.stem(x)))
        x = self.block2(torch.relu(self.widen(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def run_demo(
    factorization: FactorizationRequest, rank: RankSpec, *, seed: int, epochs: int, say: Say, progress: Say
) -> None:
    """Everything, printed through ``say``; what is under way through ``progress``. Raises DemoError, FxfactError."""
    prepare(DigitNet(), factorization, rank=rank)  # refuses a bad request before anyone waits for the training
    digits = load_digits(seed)
    images, labels = digits.train
    say(f"scikit-learn's handwritten digits: {len(labels)} images to train on, {len(digits.test[1])} held out.\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = DigitNet()
        train(dense, digits, epochs=epochs, progress=progress)
        options = {"rank": rank, "exclude": "stem", "example_inputs": images[:1]}
        started = time.perf_counter()
        small = factorize(dense, factorization, **options, verify=True)  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        call = (
            f"fxfact.factorize(dense, {factorization!r}, rank={rank!r}, exclude='stem', example_inputs=x, verify=True)"
        )
        say(f"small = {call}    # {seconds:.1f} s\n")
        plan = plan_of(small)
        say(f"{plan}\n")
        if plan.rewrites:
            first = plan.rewrites[0].path
            alone = factorize(dense, factorization, rank=rank, include=first)
            say(f"The graph around {first}, before and after:\n\n{diff(dense, alone, context=1, width=76)}\n")
    networks: dict[str, nn.Module] = {"dense": dense, "factorized": small}
    macs = [plan.network.macs, plan.after.macs]
    images = digits.test[0][:128]
    times = side_by_side([partial(network, images) for network in networks.values()])
    rows = [
        [
            name,
            f"{accuracy(net, digits):.1%}",
            f"{sum(p.numel() for p in net.parameters()):,}",
            f"{mac:,}",
            f"{ms:.2f} ms",
        ]
        for (name, net), mac, ms in zip(networks.items(), macs, times, strict=True)
    ]
    headers = ["network", "held-out accuracy", "parameters", "MACs per image", "batch of 128"]
    say(tabulate(rows, headers, disable_numparse=True))


def load_digits(seed: int) -> Digits:
    """scikit-learn's bundled digits, a quarter held out. Raises DemoError where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits as bundled  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise DemoError("the demo needs scikit-learn's digits: pip install 'fxfact[demo]'") from error
    data = bundled()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train_ = order[: len(order) // 4], order[len(order) // 4 :]
    return Digits((images[train_], labels[train_]), (images[test], labels[test]))


def train(network: nn.Module, digits: Digits, *, epochs: int, progress: Say) -> None:
    """SGD with a one-cycle schedule and a weight decay that leaves kernels of low rank; ends in evaluation mode."""
    images, labels = digits.train
    batch = 64
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
    steps = epochs * ((len(labels) + batch - 1) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    network.train()
    for epoch in range(epochs):
        for index in torch.utils.data.DataLoader(range(len(labels)), batch, shuffle=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(images[index]), labels[index]))
            optimizer.step()
            schedule.step()
        progress(f"training: epoch {epoch + 1} of {epochs}")
    network.eval()


def accuracy(network: nn.Module, digits: Digits) -> float:
    """The share of held-out digits that are recognised."""
    images, labels = digits.test
    with torch.no_grad():
        return float((network(images).argmax(1) == labels).float().mean())
