"""Networks with random weights, for timing: architectures that are used beside ResNets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.linear_networks import AttentionBlock, ConvNextTiny, VisionTransformer
from benchmarks.networks import NETWORKS, Network

# Widths; 0 is a pooling.
_VGG = {11: (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
        16: (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)}  # fmt: skip


def vgg(depth: int) -> nn.Module:
    """Return the features of VGG-11 or VGG-16."""
    layers: list[nn.Module] = []
    into = 3
    for width in _VGG[depth]:
        layers += [nn.Conv2d(into, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        into = width or into
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net in two or three dimensions, with two convolutions at each width."""

    def __init__(self, order: int, into: int, widths: Sequence[int]) -> None:
        super().__init__()
        self._conv = (nn.Conv2d, nn.Conv3d)[order - 2]
        self._norm = (nn.BatchNorm2d, nn.BatchNorm3d)[order - 2]
        up = (nn.ConvTranspose2d, nn.ConvTranspose3d)[order - 2]
        self.down = nn.ModuleList(self._twice(a, b) for a, b in zip((into, *widths), widths, strict=False))
        self.pool = (nn.MaxPool2d, nn.MaxPool3d)[order - 2](2)
        turned = list(widths)[::-1]
        self.grow = nn.ModuleList(up(a, b, 2, stride=2) for a, b in itertools.pairwise(turned))
        self.up = nn.ModuleList(self._twice(2 * b, b) for b in turned[1:])
        self.last = self._conv(widths[0], 2, 1)

    def _twice(self, into: int, width: int) -> nn.Module:
        def one(a: int) -> list[nn.Module]:
            return [self._conv(a, width, 3, padding=1, bias=False), self._norm(width), nn.ReLU()]

        return nn.Sequential(*one(into), *one(width))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = self.pool(x)
        x = kept.pop()
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([grow(x), kept.pop()], dim=1))
        return self.last(x)


class Vocoder(nn.Module):
    """A vocoder from mel spectrograms to waveforms, similar to HiFi-GAN.

    Every transposed convolution is followed by residual dilated convolutions.
    """

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.first = nn.Conv1d(80, width, 7, padding=3)
        self.grow, self.residual = nn.ModuleList(), nn.ModuleList()
        for factor in (8, 8, 4):
            self.grow.append(nn.ConvTranspose1d(width, width // 2, 2 * factor, stride=factor, padding=factor // 2))
            width //= 2
            self.residual.append(
                nn.ModuleList(nn.Conv1d(width, width, 7, padding=3 * d, dilation=d) for d in (1, 3, 5))
            )
        self.last = nn.Conv1d(width, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for grow, convs in zip(self.grow, self.residual, strict=True):
            x = grow(nn.functional.leaky_relu(x, 0.1))
            for conv in convs:
                x = x + conv(nn.functional.leaky_relu(x, 0.1))
        return torch.tanh(self.last(nn.functional.leaky_relu(x, 0.1)))


def vit_b16() -> nn.Module:
    return VisionTransformer(768, 12, 12, channels=3, patch=16, patches=196, classes=1000)


TIMED: dict[str, Network] = {
    "resnet18": NETWORKS["resnet18"],
    "resnet50": NETWORKS["resnet50"],
    "vgg11": Network(lambda: vgg(11), (3, 224, 224)),
    "vgg16": Network(lambda: vgg(16), (3, 224, 224)),
    "unet": Network(lambda: UNet(2, 1, (32, 64, 128, 256)), (1, 128, 128)),
    "dncnn": NETWORKS["dncnn"],
    "unet3d": Network(lambda: UNet(3, 1, (16, 32, 64)), (1, 32, 32, 32)),
    "vocoder": Network(Vocoder, (80, 32)),
    "vit_b16": Network(vit_b16, (3, 224, 224)),
    "convnext_t": Network(ConvNextTiny, (3, 224, 224)),
    "attention_block": Network(AttentionBlock, (256, 1280)),
}
