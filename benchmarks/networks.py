"""The networks that the benchmarks measure: definitions and trained weights.

The trained networks read their weights from the folder FXFACT_DATA (or ``../shared/data``), whose README says where
they come from. ResNet-18 and ResNet-50 (He et al. 2016) have random weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.linear_networks import ConvNext, SmallVGG, VisionTransformer


def data_folder() -> Path | None:
    """Return the folder of trained weights and data sets, or None if it does not exist."""
    folder = Path(os.environ.get("FXFACT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return folder if (folder / "weights").is_dir() else None


class CifarBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut that has no parameters ("option A")."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.grown = (out - into) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grown:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grown, self.grown))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet for 32×32 images, ``blocks`` per stage."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(CifarBlock, 16, 16, blocks, 1)
        self.layer2 = _stage(CifarBlock, 16, 32, blocks, 2)
        self.layer3 = _stage(CifarBlock, 32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(block: Callable[[int, int, int], nn.Module], into: int, out: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(block(into, out, stride), *(block(out, out, 1) for _ in range(blocks - 1)))


class WideResNet8(nn.Module):
    """MLPerf Tiny's image classifier with folded batch norms. Strided convolutions are padded as in TensorFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 40, 3, padding=1)
        for name, into, out in (("s1", 40, 40), ("s2", 40, 80), ("s3", 80, 160)):
            grows = into != out
            self.add_module(f"{name}_conv1", nn.Conv2d(into, out, 3, 1 + grows, 1 - grows))
            self.add_module(f"{name}_conv2", nn.Conv2d(out, out, 3, padding=1))
            if grows:
                self.add_module(f"{name}_skip", nn.Conv2d(into, out, 1, 2))
        self.fc = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv0(x))
        x = F.relu(x + self.s1_conv2(F.relu(self.s1_conv1(x))))
        x = F.relu(self.s2_skip(x) + self.s2_conv2(F.relu(self.s2_conv1(F.pad(x, (0, 1, 0, 1))))))
        x = F.relu(self.s3_skip(x) + self.s3_conv2(F.relu(self.s3_conv1(F.pad(x, (0, 1, 0, 1))))))
        return self.fc(x.mean((2, 3)))


class Fire(nn.Module):
    """SqueezeNet's module: a squeeze convolution, then two expansions in parallel."""

    def __init__(self, into: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(into, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 (Iandola et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, 2, ceil_mode=True)

        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool()),
            *(Fire(64, 16, 64), Fire(128, 16, 64), pool()),
            *(Fire(128, 32, 128), Fire(256, 32, 128), pool()),
            *(Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)),
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(512, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class DnCNN(nn.Module):
    """A denoiser of 17 layers (Zhang et al. 2017). Its output is the noise."""

    def __init__(self) -> None:
        super().__init__()
        inner = [layer for _ in range(15) for layer in (_conv(2, 64, 64, 3), nn.BatchNorm2d(64), nn.ReLU())]
        self.dncnn = nn.Sequential(_conv(2, 1, 64, 3), nn.ReLU(), *inner, _conv(2, 64, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.dncnn(x)


class LapBlock(nn.Module):
    """LapSRN's feature extraction for doubling the size once."""

    def __init__(self) -> None:
        super().__init__()
        convs = [layer for _ in range(10) for layer in (_conv(2, 64, 64, 3), nn.LeakyReLU(0.2))]
        up = nn.ConvTranspose2d(64, 64, 4, 2, 1, bias=False)
        self.cov_block = nn.Sequential(*convs, up, nn.LeakyReLU(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.cov_block(x)


class LapSRN(nn.Module):
    """Laplacian pyramid super-resolution ×4 (Lai et al. 2017). Returns the ×2 and the ×4 image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_input = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        for k in (1, 2):
            self.add_module(f"convt_I{k}", nn.ConvTranspose2d(1, 1, 4, 2, 1, bias=False))
            self.add_module(f"convt_R{k}", nn.Conv2d(64, 1, 3, padding=1, bias=False))
            self.add_module(f"convt_F{k}", nn.Sequential(LapBlock()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f1 = self.convt_F1(F.leaky_relu(self.conv_input(x), 0.2))
        h2 = self.convt_I1(x) + self.convt_R1(f1)
        h4 = self.convt_I2(h2) + self.convt_R2(self.convt_F2(f1))
        return h2, h4


def fashion_cnn() -> nn.Sequential:
    return nn.Sequential(
        *(_conv(2, 1, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(_conv(2, 32, 64, 5), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(_conv(2, 64, 128, 3), nn.BatchNorm2d(128), nn.ReLU()),
        *(_conv(2, 128, 128, 3), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
    )


def fsdd_conv1d() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv1d(1, 32, 64, 16, 24, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.MaxPool1d(4)),
        *(_conv(1, 32, 64, 9), nn.BatchNorm1d(64), nn.ReLU(), nn.MaxPool1d(2)),
        *(_conv(1, 64, 128, 9), nn.BatchNorm1d(128), nn.ReLU(), nn.MaxPool1d(2)),
        *(_conv(1, 128, 128, 5), nn.BatchNorm1d(128), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, 10)),
    )


def adrenal_conv3d() -> nn.Sequential:
    return nn.Sequential(
        *(_conv(3, 1, 16, 3, 2), nn.BatchNorm3d(16), nn.ReLU()),
        *(_conv(3, 16, 32, 3), nn.BatchNorm3d(32), nn.ReLU(), nn.MaxPool3d(2)),
        *(_conv(3, 32, 64, 3), nn.BatchNorm3d(64), nn.ReLU(), nn.MaxPool3d(2)),
        *(_conv(3, 64, 64, 3), nn.BatchNorm3d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(), nn.Linear(64, 2)),
    )


def _conv(order: int, into: int, out: int, kernel: int, stride: int = 1) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[order - 1]
    return kind(into, out, kernel, stride, kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """ResNet-18's block."""

    expansion = 1

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(into, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """ResNet-50's block, with the stride on the 3×3 convolution."""

    expansion = 4

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(into, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _shortcut(into: int, out: int, stride: int) -> nn.Module:
    if stride == 1 and into == out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class ResNet(nn.Module):
    """A ResNet for ImageNet, with torchvision's names."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for k, count in enumerate(blocks):
            width, layers = 64 << k, []
            for index in range(count):
                layers.append(block(channels, width, 2 if k and not index else 1))
                channels = width * block.expansion
            self.add_module(f"layer{k + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class VGG16(nn.Sequential):
    """VGG-16 (Simonyan and Zisserman 2015)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        head = [
            nn.Flatten(),
            nn.Linear(25088, 4096),
            nn.ReLU(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, 1000),
        ]
        super().__init__(*layers, *head)


class UNet(nn.Module):
    """A U-Net (Ronneberger, Fischer and Brox 2015) with padding, for two classes."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256, 512)) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList([_double_conv(into, out) for into, out in pairwise((3, *widths))])
        self.up = nn.ModuleList([nn.ConvTranspose2d(out, into, 2, stride=2) for into, out in reversed(pairs)])
        self.joined = nn.ModuleList([_double_conv(out, into) for into, out in reversed(pairs)])
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped: list[Tensor] = []
        for k, stage in enumerate(self.down):
            x = stage(F.max_pool2d(x, 2) if k else x)
            skipped.append(x)
        skipped.pop()
        for up, joined in zip(self.up, self.joined, strict=True):
            x = joined(torch.cat([skipped.pop(), up(x)], dim=1))
        return self.head(x)


def _double_conv(channels_in: int, channels_out: int) -> nn.Sequential:
    first, second = (
        nn.Conv2d(channels, channels_out, 3, padding=1, bias=False) for channels in (channels_in, channels_out)
    )
    return nn.Sequential(
        first, nn.BatchNorm2d(channels_out), nn.ReLU(), second, nn.BatchNorm2d(channels_out), nn.ReLU()
    )


@dataclass(frozen=True)
class Network:
    """A network: how to build it, the shape of one input, and the name of its trained weights, if it has any."""

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    weights: str | None = None

    def load(self) -> nn.Module:
        """Build the network in evaluation mode, trained, or with random weights of a fixed seed if there are none."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.build()
        folder = data_folder()
        if self.weights and folder:
            network.load_state_dict(torch.load(folder / "weights" / f"{self.weights}.pt", weights_only=True))
        return network.eval()


NETWORKS: dict[str, Network] = {
    "resnet20": Network(lambda: CifarResNet(3), (3, 32, 32), "resnet20_cifar10"),
    "resnet56": Network(lambda: CifarResNet(9), (3, 32, 32), "resnet56_cifar10"),
    "wide_resnet8": Network(WideResNet8, (3, 32, 32), "wide_resnet8_cifar10"),
    "squeezenet": Network(SqueezeNet, (3, 224, 224), "squeezenet1_1_imagenet"),
    "dncnn": Network(DnCNN, (1, 64, 64), "dncnn_s25"),
    "lapsrn": Network(LapSRN, (1, 32, 32), "lapsrn_x4"),
    "fashion_cnn": Network(fashion_cnn, (1, 28, 28), "fashion_cnn"),
    "fashion_vit": Network(VisionTransformer, (1, 28, 28), "fashion_vit"),
    "fashion_convnext": Network(ConvNext, (1, 28, 28), "fashion_convnext"),
    "fashion_vgg_fc": Network(SmallVGG, (1, 28, 28), "fashion_vgg_fc"),
    "fsdd_conv1d": Network(fsdd_conv1d, (1, 8000), "fsdd_conv1d"),
    "adrenal_conv3d": Network(adrenal_conv3d, (1, 32, 32, 32), "adrenal_conv3d"),
    "resnet18": Network(lambda: ResNet(BasicBlock, (2, 2, 2, 2)), (3, 224, 224)),
    "resnet50": Network(lambda: ResNet(Bottleneck, (3, 4, 6, 3)), (3, 224, 224)),
    "vgg16": Network(VGG16, (3, 224, 224)),
    "unet": Network(UNet, (3, 224, 224)),
}
