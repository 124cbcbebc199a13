"""What the trained networks were trained for: their data, and one figure that says how well they do it.

The figures of the dense networks are those of the data's own README; a test holds our definitions against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.networks import data_folder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Task:
    """``figure`` measures a network, in ``unit``; ``dense`` is what the trained network reaches."""

    figure: Callable[[nn.Module], float]
    unit: str
    dense: float


def arrays(name: str) -> Any:
    folder: Path | None = data_folder()
    if folder is None:
        raise FileNotFoundError("the data sets are not here: set FXFACT_DATA to their folder")
    return np.load(folder / f"{name}.npz")


def outputs(network: nn.Module, inputs: Tensor, batch: int = 250) -> Iterator[Tensor]:
    with torch.inference_mode():
        for part in inputs.split(batch):
            yield network(part)


def top1(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    right = (torch.cat([y.argmax(1) for y in outputs(network, inputs)]) == labels).sum()
    return 100 * float(right) / len(labels)


def cifar10_images(name: str, *, normalised: bool) -> tuple[Tensor, Tensor]:
    """Images and labels of a part of CIFAR-10."""
    data = arrays(name)
    x = torch.from_numpy(data["x"]).float()
    if normalised:
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        x = (x / 255 - mean) / std
    return x, torch.from_numpy(data["y"])


def cifar10(network: nn.Module, *, normalised: bool) -> float:
    return top1(network, *cifar10_images("cifar10_test_a", normalised=normalised))


def imagenet(network: nn.Module) -> float:
    data = arrays("imagenet_a")
    x = np.cumsum(data["delta"], axis=-1, dtype=np.uint8)
    x[:, 0] += x[:, 1]
    x[:, 2] += x[:, 1]
    images = torch.from_numpy(x).float() - torch.tensor((123.0, 117.0, 104.0))[:, None, None]
    return top1(network, images, torch.from_numpy(data["y"]))


def denoising(network: nn.Module) -> float:
    images = arrays("set12")
    scores = []
    for index, name in enumerate(sorted(images.files)):
        x = torch.from_numpy(images[name]).float()[None, None] / 255
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index))
        noisy = x + 25 / 255 * noise
        (found,) = outputs(network, noisy)
        scores.append(psnr((noisy - found).clamp(0, 1), x, 1))
    return sum(scores) / len(scores)


def super_resolution(network: nn.Module) -> float:
    images = arrays("set5")
    names = sorted(name.removesuffix("_rgb") for name in images.files if name.endswith("_rgb"))
    scores = []
    for name in names:
        low, high = (torch.from_numpy(images[f"{name}_{kind}"])[None, None] for kind in ("lr4_y", "hr_y"))
        ((_, found),) = outputs(network, low / 255)
        inside = (..., slice(4, -4), slice(4, -4))
        scores.append(psnr((found * 255).clamp(0, 255)[inside], high[inside], 255))
    return sum(scores) / len(scores)


def psnr(found: Tensor, truth: Tensor, peak: float) -> float:
    return 10 * math.log10(peak**2 / float((found - truth).square().mean()))


def fashion(network: nn.Module) -> float:
    data = arrays("fashion_mnist")
    x = (torch.from_numpy(data["test_x"]).float()[:, None] / 255 - 0.286) / 0.353
    return top1(network, x, torch.from_numpy(data["test_y"]))


def spoken_digits(network: nn.Module) -> float:
    data = arrays("fsdd_a")
    return top1(network, torch.from_numpy(data["test_x"]).float()[:, None] / 32768, torch.from_numpy(data["test_y"]))


def adrenal(network: nn.Module) -> float:
    data = arrays("adrenal3d_a")
    x = torch.from_numpy(data["test_x"]).float()[:, None] / 255
    return top1(network, x, torch.from_numpy(data["test_y"]))


TASKS: dict[str, Task] = {
    "resnet20": Task(lambda net: cifar10(net, normalised=True), "top-1 %", 100 * 4565 / 4990),
    "resnet56": Task(lambda net: cifar10(net, normalised=True), "top-1 %", 100 * 4638 / 4990),
    "wide_resnet8": Task(lambda net: cifar10(net, normalised=False), "top-1 %", 100 * 4550 / 4990),
    "squeezenet": Task(imagenet, "top-1 %", 100 * 300 / 500),
    "dncnn": Task(denoising, "PSNR dB", 30.397),
    "lapsrn": Task(super_resolution, "PSNR dB", 31.645),
    "fashion_cnn": Task(fashion, "top-1 %", 100 * 9107 / 10000),
    "fsdd_conv1d": Task(spoken_digits, "top-1 %", 100 * 175 / 180),
    "adrenal_conv3d": Task(adrenal, "accuracy %", 100 * 136 / 149),
}
