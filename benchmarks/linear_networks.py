"""Networks that consist of linear layers for the most part: transformers, a ConvNeXt, a VGG, a block of attention.

Their defaults are for images of 28×28, and trained weights exist for them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head attention with one linear layer for queries, keys and values (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        projected = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        queries, keys, values = projected.permute(2, 0, 3, 1, 4).unbind(0)
        found = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(found.transpose(1, 2).reshape(batch, tokens, width))


class EncoderBlock(nn.Module):
    """Attention, then two linear layers, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) for images with these channels and ``patches`` patches."""

    def __init__(
        self, width: int = 96, depth: int = 4, heads: int = 4, *, channels: int = 1, patch: int = 4,
        patches: int = 49, classes: int = 10,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(0.02 * torch.randn(1, patches + 1, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(x.shape[0], -1, -1), patches], 1) + self.pos
        return self.head(self.norm(self.blocks(tokens)[:, 0]))


class NextBlock(nn.Module):
    """ConvNeXt's block: a depthwise convolution, then two linear layers over the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.fc2(F.gelu(self.fc1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """A ConvNeXt (Liu et al. 2022) of two stages."""

    def __init__(self, widths: tuple[int, int] = (48, 96), depth: int = 3) -> None:
        super().__init__()
        first, second = widths
        self.stem = nn.Conv2d(1, first, 2, 2)
        self.stage1 = nn.Sequential(*(NextBlock(first) for _ in range(depth)))
        self.down = nn.Conv2d(first, second, 2, 2)
        self.stage2 = nn.Sequential(*(NextBlock(second) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(second), nn.Linear(second, 10)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(maps.mean((2, 3))))


class ConvNextTiny(nn.Sequential):
    """A network of the shape of ConvNeXt-T (Liu et al. 2022), without the norms between its stages."""

    def __init__(self) -> None:
        stages = ((96, 3), (192, 3), (384, 9), (768, 3))
        layers: list[nn.Module] = [nn.Conv2d(3, 96, 4, 4)]
        into = 96
        for width, depth in stages:
            layers += [] if width == into else [nn.Conv2d(into, width, 2, 2)]
            layers += [NextBlock(width) for _ in range(depth)]
            into = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(into), nn.Linear(into, 1000))


class AttentionBlock(nn.Module):
    """A block of attention as in diffusion models: over itself, over a text of 77 tokens, then a gated linear unit."""

    def __init__(self, width: int = 1280, heads: int = 20, text: int = 768) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.own = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(3)])
        self.cross = nn.ModuleList([nn.Linear(into, width, bias=False) for into in (width, text, text)])
        self.outs = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.gated, self.last = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)
        self.register_buffer("text", torch.randn(1, 77, text))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.norms
        y = first(x)
        x = x + self.outs[0](self._attention(*(layer(y) for layer in self.own)))
        queries, keys, values = self.cross
        text = self.text.expand(x.shape[0], -1, -1)
        x = x + self.outs[1](self._attention(queries(second(x)), keys(text), values(text)))
        hidden, gate = self.gated(third(x)).chunk(2, dim=-1)
        return x + self.last(hidden * F.gelu(gate))

    def _attention(self, *projected: Tensor) -> Tensor:
        split = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in projected]
        return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


class SmallVGG(nn.Module):
    """Three convolutions and three linear layers, in which nearly all of the parameters are."""

    def __init__(self) -> None:
        super().__init__()
        convs = [nn.Conv2d(into, out, 3, padding=1) for into, out in ((1, 24), (24, 48), (48, 96))]
        first, second, third = ([conv, nn.ReLU()] for conv in convs)
        self.features = nn.Sequential(*first, *second, nn.MaxPool2d(2), *third, nn.MaxPool2d(2))
        wide = [nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 49, 512), nn.ReLU(), nn.Dropout(0.3)]
        self.classifier = nn.Sequential(*wide, nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))
