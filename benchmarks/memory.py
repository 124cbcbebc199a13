"""Memory and time of factorizing a convolutional U-Net with a billion parameters, compared with the promised bound.

    python -m benchmarks.memory                        # about five minutes and 12 GB on two cores; Linux
    python -m benchmarks.memory --factorization cp --channels 64 128 256 256

The network is a diffusers UNet2DModel with random weights (the extra [zoo]). Besides the original, which is not
changed, factorizing may take the size of the result, eight times the largest kernel, and a tenth more. The peak is the
kernel's own count of resident pages (VmHWM), which is reset before the call.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxfact
from benchmarks.report import save, show

DEFAULT = [448, 896, 1344, 1856]


def build(channels: list[int]) -> nn.Module:
    from diffusers import UNet2DModel  # noqa: PLC0415 (an extra)

    count = len(channels)
    return UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * count,
        up_block_types=("UpBlock2D",) * count,
    ).eval()


def resident(name: str) -> int:
    """Return resident bytes: 'VmRSS' now, 'VmHWM' at the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def reset_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def bytes_of(network: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))


def measure(channels: list[int], factorization: str, rank: float) -> dict[str, Any]:
    model = build(channels)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    largest = max(conv.weight.numel() * conv.weight.element_size() for conv in convs)
    inputs = (torch.randn(1, 4, 16, 16), torch.tensor([10]))
    with torch.no_grad():
        model(*inputs)  # libraries allocate memory in a first run
    reset_peak()
    before, started = resident("VmRSS"), time.perf_counter()
    result = fxfact.factorize(model, [factorization, "svd"], rank=rank, example_inputs=inputs)
    seconds, peak = time.perf_counter() - started, resident("VmHWM") - before
    plan, size = fxfact.plan_of(result), bytes_of(result)
    bound = 1.1 * (size + 8 * largest)
    return {
        "parameters": plan.network.params,
        "after": sum(parameter.numel() for parameter in result.parameters()),
        "convolutions": f"{len(plan.rewrites)} of {len(plan)}",
        "frontend": plan.capture,
        "seconds": seconds,
        "peak beyond GB": peak / 1e9,
        "bound GB": bound / 1e9,
        "result GB": size / 1e9,
        "largest kernel GB": largest / 1e9,
        "peak / bound": peak / bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=DEFAULT)
    parser.add_argument("--factorization", default="tucker")
    parser.add_argument("--rank", type=float, default=0.5)
    given = parser.parse_args()
    row = measure(given.channels, given.factorization, given.rank)
    show(f"{given.factorization} at {given.rank} of a U-Net", [row])
    save("memory", {"row": row})


if __name__ == "__main__":
    main()
