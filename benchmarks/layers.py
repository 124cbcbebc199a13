"""The layers of ``fxfact.nn``: transduction to videos, joint against separate layers, and ranks pruned after a lasso.

``python -m benchmarks.layers [transduction] [joint] [lasso]``
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
import fxfact.nn as fnn
from benchmarks.networks import NETWORKS
from benchmarks.report import save, show
from benchmarks.tasks import cifar10, fashion

Row = dict[str, Any]
_FRAMES = 8


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def batches(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    yield from ((x[part], y[part]) for part in order.split(size))


def fit(
    model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, lr: float, penalty: Callable[[], Tensor | float]
) -> None:
    """Train with Adam and a cosine schedule, on the cross entropy plus a penalty."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    steps = epochs * -(-len(data[0]) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for epoch in range(epochs):
        for x, y in batches(*data, 64, epoch):
            loss = F.cross_entropy(model(x), y) + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    hits = [model(x).argmax(1) == y for x, y in batches(*data, 128, 0)]
    return 100 * float(torch.cat(hits).float().mean())


def sliding(part: str, count: int) -> tuple[Tensor, Tensor]:
    """Return clips (count, 1, frames, 28, 28) of pictures that slide to the left (0) or to the right (1)."""
    generator = torch.Generator().manual_seed(0 if part == "train" else 1)
    pictures = fashion(part)[0][:count]
    labels = torch.randint(2, (count,), generator=generator)
    starts = torch.randint(28, (count,), generator=generator)
    clips = torch.stack(
        [
            torch.stack(
                [picture.roll(int(start) + 2 * frame * (2 * int(label) - 1), -1) for frame in range(_FRAMES)], 1
            )
            for picture, label, start in zip(pictures, labels, starts, strict=True)
        ]
    )
    return clips, labels


def factorized_layers(model: nn.Module, rank: float) -> nn.Module:
    """Return a copy whose convolutions are Tucker layers, except the first one."""
    result = copy.deepcopy(model)
    convs = [name for name, m in result.named_modules() if isinstance(m, nn.Conv2d)]
    for name in convs[1:]:
        result.set_submodule(name, fnn.TuckerConv.from_conv(result.get_submodule(name), rank))
    return result


def transduction() -> list[Row]:
    """Teach a network of trained, factorized layers the direction in which pictures slide."""
    torch.manual_seed(0)
    images = factorized_layers(NETWORKS["fashion_cnn"].load(), 0.3)
    images[-1] = nn.Linear(128, 2)
    train, test = sliding("train", 768), sliding("test", 512)
    rows = []
    for kernel_size, train_all in ((1, True), (3, False), (3, True)):
        video = fxfact.transduct(images.eval(), train[0][:2, :, 0], kernel_size=kernel_size, train_all=train_all)
        started = time.perf_counter()
        fit(video, train, 3, 2e-3, lambda: 0.0)
        trained = "everything" if train_all else "new stages, norms and head"
        rows.append(
            {
                "kernel along time": kernel_size,
                "trained": trained,
                "trained parameters": sum(p.numel() for p in video.parameters() if p.requires_grad),
                "seconds": time.perf_counter() - started,
                "direction right %": accuracy(video, test),
            }
        )
        show("Direction of sliding pictures", rows)
    return rows


def equal_convs(model: nn.Module) -> list[list[str]]:
    """Return the names of convolutions with equal shapes, those of each shape together, if there are at least two."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            groups.setdefault(tuple(module.weight.shape), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def jointly(model: nn.Module, names: Sequence[str], factorization: str, rank: Any) -> int:
    """Replace convolutions by those of a joint layer, and return its number of parameters."""
    joint = fnn.JointConv.from_conv_list([model.get_submodule(n) for n in names], rank, factorization=factorization)
    for name, conv in zip(names, joint, strict=True):
        model.set_submodule(name, conv)
    return params(joint)


def core_rank(model: nn.Module, names: Sequence[str], fraction: float) -> tuple[int, int, int]:
    """Return the largest Tucker rank with a core for each convolution that has a fraction of the parameters."""
    out, into, *kernel = model.get_submodule(names[0]).weight.shape
    count, taps = len(names), math.prod(kernel)

    def size(r: int) -> int:
        return count**2 + (out + into) * r + count * taps * r * r

    rank = max(r for r in range(1, min(out, into) + 1) if size(r) <= fraction * count * out * into * taps)
    return (count, rank, rank)


def separately(model: nn.Module, names: Sequence[str], factorization: str, most: int) -> int:
    """Replace convolutions by layers of the largest rank with which all together have at most so many parameters."""
    convs = [model.get_submodule(name) for name in names]
    factorize = fnn.FactorizedConv.from_conv
    probe = factorize(convs[0], 1, factorization=factorization, decompose_weights=False)
    ranks = probe.factorization.ranks(probe.spec)
    sizes = [params(factorize(convs[0], r, factorization=factorization, decompose_weights=False)) for r in ranks]
    rank = [r for r, size in zip(ranks, sizes, strict=True) if size * len(convs) <= most][-1]
    for name, conv in zip(names, convs, strict=True):
        model.set_submodule(name, factorize(conv, rank, factorization=factorization))
    return sum(params(model.get_submodule(name)) for name in names)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(128)])


def joint() -> list[Row]:
    """Compare joint with separate layers on ResNet-56, without training, at equal numbers of parameters."""
    dense = NETWORKS["resnet56"].load().eval()
    x, y = (part[:1000] for part in cifar10("cifar10_test_a", normalised=True))
    expected = logits(dense, x)
    rows: list[Row] = []

    def add(name: str, model: nn.Module, count: int) -> None:
        found = logits(model.eval(), x)
        kl = F.kl_div(found.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="batchmean")
        top1 = 100 * float((found.argmax(1) == y).float().mean())
        rows.append(
            {
                "layers": name,
                "parameters": count,
                "KL, nats": float(kl),
                "top-1 %": top1,
            }
        )
        show("ResNet-56: convolutions of equal shape", rows)

    sets = equal_convs(dense)
    add("dense", dense, sum(params(dense.get_submodule(name)) for names in sets for name in names))
    for fraction, own_cores in ((0.8, True), (0.8, False), (0.5, True)):
        made, apart = copy.deepcopy(dense), copy.deepcopy(dense)
        counts = []
        for names in sets:
            rank = core_rank(made, names, fraction) if own_cores else fraction
            counts.append(jointly(made, names, "tucker", rank))
        add("joint, a core for each" if own_cores else "joint", made, sum(counts))
        counts = [separately(apart, names, "tucker", most) for names, most in zip(sets, counts, strict=True)]
        add("separate", apart, sum(counts))
    return rows


class Digits(nn.Module):
    """A network of factorized layers for 8×8 digits."""

    def __init__(self, kind: type[fnn.FactorizedConv], rank: Any) -> None:
        super().__init__()
        self.stem, self.norms = nn.Conv2d(1, 48, 3, padding=1), nn.ModuleList(nn.BatchNorm2d(48) for _ in range(3))
        self.layers = nn.ModuleList(kind(48, 48, (3, 3), padding=1, rank=rank) for _ in range(3))
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + torch.relu(norm(layer(x)))
        return self.head(x.mean((2, 3)))


def lasso() -> list[Row]:
    """Train layers with and without a lasso, prune their ranks, and fine-tune them shortly."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 (an extra)

    digits = load_digits()
    x, y = torch.tensor(digits.images[:, None], dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = ((x[part], y[part]) for part in (order[:1200], order[1200:]))
    rows: list[Row] = []
    for kind, rank in ((fnn.CPConv, 48), (fnn.TuckerConv, 24), (fnn.TTConv, 24)):
        for penalty in (0.0, 0.01, 0.03):
            torch.manual_seed(0)
            model = Digits(kind, rank)
            if penalty:
                fnn.tensor_lasso(model, threshold=0.01)
            fit(
                model,
                train,
                40,
                5e-3,
                (lambda m=model, p=penalty: fnn.lasso_loss(m, p, normalize_loss=False)) if penalty else lambda: 0.0,
            )
            pruned = fnn.prune_ranks(model)
            rows.append(
                {
                    "layers": kind.__name__,
                    "penalty of a gain": penalty,
                    "ranks": " ".join(str(layer.rank).replace(" ", "") for layer in pruned.layers),
                    "parameters": sum(params(layer) for layer in model.layers),
                    "pruned": sum(params(layer) for layer in pruned.layers),
                    "accuracy %": accuracy(model, test),
                    "pruned %": accuracy(pruned, test),
                }
            )
            show("Digits: ranks after training with a lasso", rows)
    return rows


PARTS = {"transduction": transduction, "joint": joint, "lasso": lasso}

if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or list(PARTS)
    for part in chosen:
        save(f"layers_{part}", {"rows": PARTS[part]()})
