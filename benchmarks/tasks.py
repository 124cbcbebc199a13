"""The tasks of the trained networks: test data, a score, and unlabelled data for calibration.

The scores of the dense networks are those of the data's README. tests/unit/test_benchmarks.py compares our definitions
with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import data_folder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PATCH = 64  # pixels on each side of a calibration patch


@dataclass(frozen=True)
class Tests:
    """Test batches, and ``score``, which maps the number of a batch and its output to the scores (n,)."""

    batches: Sequence[Tensor]
    score: Callable[[int, Any], Tensor]

    def run(self, network: nn.Module) -> Iterator[tuple[Any, Tensor]]:
        """Yield the output and the scores of every batch."""
        for number, batch in enumerate(self.batches):
            with torch.inference_mode():
                output = network(batch)
            yield output, self.score(number, output)


@dataclass(frozen=True)
class Task:
    """What a network was trained for.

    Attributes:
        tests: the test samples.
        calibration: unlabelled samples that are not tested.
        unit: the unit of the score.
        dense: the score of the trained dense network on all tests.
        shared: whether the calibration samples are the tests with even numbers, so that only the odd ones are tested.
    """

    tests: Callable[[], Tests]
    calibration: Callable[[], Tensor]
    unit: str
    dense: float
    shared: bool = False

    def score(self, network: nn.Module) -> float:
        """Return the mean score of a network over all tests."""
        return float(torch.cat([scores for _, scores in self.tests().run(network)]).double().mean())

    def batches(self, count: int, seed: int, size: int = 64) -> tuple[Tensor, ...]:
        """Return ``count`` calibration samples, drawn without replacement, in batches of ``size``."""
        samples = self.calibration()
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        return samples[order[:count]].split(size)


def arrays(name: str) -> Any:
    folder: Path | None = data_folder()
    if folder is None:
        raise FileNotFoundError("the data sets are missing: set FXFACT_DATA to their folder")
    return np.load(folder / f"{name}.npz")


def classified(inputs: Tensor, labels: Tensor, size: int = 250) -> Tests:
    """Return tests that score 100 for a correct class and 0 for a wrong one."""
    parts = labels.split(size)
    return Tests(inputs.split(size), lambda number, output: 100.0 * (output.argmax(1) == parts[number]))


def psnr(found: Tensor, truth: Tensor, peak: float) -> Tensor:
    """Return the peak signal-to-noise ratio of one image in dB, as (1,)."""
    return 10 * torch.log10(peak**2 / (found - truth).square().mean())[None]


@cache
def cifar10(name: str, *, normalised: bool) -> tuple[Tensor, Tensor]:
    """Return images and labels of a part of CIFAR-10."""
    data = arrays(name)
    x = torch.from_numpy(data["x"]).float()
    if normalised:
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        x = (x / 255 - mean) / std
    return x, torch.from_numpy(data["y"])


@cache
def imagenet() -> tuple[Tensor, Tensor]:
    data = arrays("imagenet_a")
    x = np.cumsum(data["delta"], axis=-1, dtype=np.uint8)
    x[:, 0] += x[:, 1]
    x[:, 2] += x[:, 1]
    return torch.from_numpy(x).float() - torch.tensor((123.0, 117.0, 104.0))[:, None, None], torch.from_numpy(data["y"])


@cache
def denoising() -> Tests:
    images = arrays("set12")
    clean = [torch.from_numpy(images[name]).float()[None, None] / 255 for name in sorted(images.files)]
    noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(k)) for k, x in enumerate(clean)]
    noisy = [x + 25 / 255 * e for x, e in zip(clean, noise, strict=True)]
    return Tests(noisy, lambda k, output: psnr((noisy[k] - output).clamp(0, 1), clean[k], 1))


@cache
def noisy_patches() -> Tensor:
    """Return patches of the luma of Set5, one every 32 pixels, with noise of the same deviation as the tests."""
    names = _set5()
    clean = torch.cat([_patches(torch.from_numpy(arrays("set5")[f"{name}_hr_y"])[None, None] / 255) for name in names])
    return clean + 25 / 255 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))


@cache
def super_resolution() -> Tests:
    images = arrays("set5")
    low, high = (
        [torch.from_numpy(images[f"{name}_{kind}"])[None, None] for name in _set5()] for kind in ("lr4_y", "hr_y")
    )
    inside = (..., slice(4, -4), slice(4, -4))
    return Tests(
        [x / 255 for x in low], lambda k, output: psnr((output[1] * 255).clamp(0, 255)[inside], high[k][inside], 255)
    )


@cache
def small_patches() -> Tensor:
    """Return patches of Set12 at a quarter of its size."""
    images = arrays("set12")
    clean = [torch.from_numpy(images[name]).float()[None, None] / 255 for name in sorted(images.files)]
    reduced = [F.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1) for x in clean]
    return torch.cat([_patches(x, _PATCH // 2) for x in reduced])


def _set5() -> list[str]:
    return sorted(name.removesuffix("_rgb") for name in arrays("set5").files if name.endswith("_rgb"))


def _patches(image: Tensor, size: int = _PATCH) -> Tensor:
    """Return patches (count, 1, size, size) that overlap by half."""
    return F.unfold(image, size, stride=size // 2).transpose(1, 2).reshape(-1, 1, size, size)


@cache
def fashion(part: str) -> tuple[Tensor, Tensor]:
    data = arrays("fashion_mnist")
    x = (torch.from_numpy(data[f"{part}_x"]).float()[:, None] / 255 - 0.286) / 0.353
    return x, torch.from_numpy(data[f"{part}_y"])


@cache
def scaled(name: str, part: str, peak: float) -> tuple[Tensor, Tensor]:
    """Return samples with one channel, divided by ``peak``, and labels."""
    data = arrays(name)
    return torch.from_numpy(data[f"{part}_x"]).float()[:, None] / peak, torch.from_numpy(data[f"{part}_y"])


def _cifar10(dense: float, *, normalised: bool) -> Task:
    return Task(
        lambda: classified(*cifar10("cifar10_test_a", normalised=normalised)),
        lambda: cifar10("cifar10_train", normalised=normalised)[0],
        "top-1 %",
        dense,
    )


def _fashion(dense: float) -> Task:
    return Task(lambda: classified(*fashion("test")), lambda: fashion("train")[0], "top-1 %", dense)


def _scaled(name: str, peak: float, unit: str, dense: float) -> Task:
    return Task(lambda: classified(*scaled(name, "test", peak)), lambda: scaled(name, "train", peak)[0], unit, dense)


TASKS: dict[str, Task] = {
    "resnet20": _cifar10(100 * 4565 / 4990, normalised=True),
    "resnet56": _cifar10(100 * 4638 / 4990, normalised=True),
    "wide_resnet8": _cifar10(100 * 4550 / 4990, normalised=False),
    "squeezenet": Task(
        lambda: classified(*imagenet(), size=50),
        lambda: imagenet()[0][::2],
        "top-1 %",
        100 * 300 / 500,
        shared=True,
    ),
    "dncnn": Task(denoising, noisy_patches, "PSNR dB", 30.397),
    "lapsrn": Task(super_resolution, small_patches, "PSNR dB", 31.645),
    "fashion_cnn": _fashion(91.07),
    "fashion_vit": _fashion(84.68),
    "fashion_convnext": _fashion(84.73),
    "fashion_vgg_fc": _fashion(87.24),
    "fsdd_conv1d": _scaled("fsdd_a", 32768, "top-1 %", 100 * 175 / 180),
    "adrenal_conv3d": _scaled("adrenal3d_a", 255, "accuracy %", 100 * 136 / 149),
}
