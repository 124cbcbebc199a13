"""The demo: train a small network on handwritten digits, factorize it, and compare the two networks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfact import analysis, api
from fxfact.errors import FxfactError
from fxfact.factorizations import RankSpec
from fxfact.planning import FactorizationRequest
from fxfact.utils import Column, Table, side_by_side, terminal_width

Print = Callable[[str], None]
_BATCH = 64


class DemoError(FxfactError, ValueError):
    """The demo cannot run, because scikit-learn is not installed."""


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8), scaled to 0 … 1, and labels (n,): a training set and a test set."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Block(nn.Module):
    """A residual block of two 3×3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
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
        """Map (batch, 1, 8, 8) to logits (batch, 10)."""
        x = self.block1(torch.relu(self.stem(x)))
        x = self.block2(torch.relu(self.widen(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def run_demo(
    factorization: FactorizationRequest,
    rank: RankSpec,
    *,
    seed: int,
    epochs: int,
    print_text: Print,
    print_progress: Print,
) -> None:
    """Train, factorize and compare. Raises FxfactError for a request that cannot be met, DemoError for missing data."""
    api.plan(DigitNet(), factorization, rank=rank)  # reports a wrong request before the training, which takes longer
    digits = load_digits(seed)
    images, labels = digits.train
    print_text(
        f"scikit-learn's handwritten digits: {len(labels)} images to train on, {len(digits.test[1])} held out.\n"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = DigitNet()
        train(dense, digits, epochs=epochs, print_progress=print_progress)
        started = time.perf_counter()
        small = api.factorize(dense, factorization, rank=rank, exclude="stem", example_inputs=images[:1], verify=True)
        seconds = time.perf_counter() - started
        call = (
            f"fxfact.factorize(dense, {factorization!r}, rank={rank!r}, exclude='stem', example_inputs=x, verify=True)"
        )
        print_text(f"small = {call}    # {seconds:.1f} s\n")
        plan = api.plan_of(small)
        print_text(f"{plan}\n")
        if plan.rewrites:
            path = plan.rewrites[0].path
            one_factorized = api.factorize(dense, factorization, rank=rank, include=path)
            difference = analysis.diff(dense, one_factorized, context=1)
            print_text(f"The graph around {path}, before and after:\n\n{difference}\n")
    macs = (plan.network.macs, plan.after.macs)
    print_text(_comparison({"dense": dense, "factorized": small}, macs, digits))


def load_digits(seed: int) -> Digits:
    """Load the digits of scikit-learn, a quarter of them held out. Raises DemoError if it is not installed."""
    try:
        from sklearn.datasets import load_digits as load_bunch  # noqa: PLC0415 (an optional dependency)
    except ImportError as error:
        raise DemoError("The demo needs the digits of scikit-learn. Run pip install 'fxfact[demo]'.") from error
    bunch = load_bunch()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train_ = order[: len(order) // 4], order[len(order) // 4 :]
    return Digits((images[train_], labels[train_]), (images[test], labels[test]))


def train(network: nn.Module, digits: Digits, *, epochs: int, print_progress: Print) -> None:
    """Train with SGD on a one-cycle schedule, and leave the network in evaluation mode.

    The weight decay is strong, so that the kernels have a low effective rank.
    """
    images, labels = digits.train
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
    steps = epochs * ((len(labels) + _BATCH - 1) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    network.train()
    for epoch in range(epochs):
        for index in torch.utils.data.DataLoader(range(len(labels)), _BATCH, shuffle=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(images[index]), labels[index]))
            optimizer.step()
            schedule.step()
        print_progress(f"training: epoch {epoch + 1} of {epochs}")
    network.eval()


def accuracy(network: nn.Module, digits: Digits) -> float:
    """Return the share of held-out digits that are classified correctly."""
    images, labels = digits.test
    with torch.no_grad():
        return float((network(images).argmax(1) == labels).float().mean())


def _comparison(networks: dict[str, nn.Module], macs: tuple[int | None, ...], digits: Digits) -> str:
    """Return a table of accuracy, size and time of the networks."""
    batch = digits.test[0][:128]
    times = side_by_side([partial(network, batch) for network in networks.values()])
    rows = [
        [
            name,
            f"{accuracy(network, digits):.1%}",
            f"{sum(p.numel() for p in network.parameters()):,}",
            f"{count:,}",
            f"{ms:.2f} ms",
        ]
        for (name, network), count, ms in zip(networks.items(), macs, times, strict=True)
    ]
    columns = [
        Column("network", 0),
        Column(("held-out accuracy", "accuracy"), 1),
        Column("parameters", 4),
        Column(("MACs per image", "MACs"), 2),
        Column("batch of 128", 3),
    ]
    return Table(columns, rows).format(terminal_width())
