"""The values of options: what a text on the command line means."""

from __future__ import annotations

import argparse
import importlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_FACTORS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse_size(text: str) -> dict[str, float]:
    """Return the arguments of a budget of MACs or parameters: 0.5, 50%, 20M, 900k, 900000."""
    if (share := _share(text)) is not None:
        return {"fraction": share}
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kMGT]?)", text)
    amount = 0.0 if found is None else float(found[1]) * _FACTORS[found[2]]
    if amount < 1:
        raise argparse.ArgumentTypeError(f"must be a share such as 0.5, or a number such as 20M, got {text!r}")
    return {"at_most": amount}


def parse_time(text: str) -> dict[str, float]:
    """Return the arguments of a budget of milliseconds: 0.5, 50%, 12ms."""
    if (share := _share(text)) is not None:
        return {"fraction": share}
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?ms", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"must be a share such as 0.5, or milliseconds such as 12ms, got {text!r}")
    return {"at_most_ms": float(found[1])}


def _share(text: str) -> float | None:
    """Return a share of at most 1, which may be written in percent, or None if the text is none."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return share if 0 < share <= 1 else None


def parse_names(text: str) -> str | list[str]:
    """Return a name, or a list of those that commas separate."""
    names = text.split(",")
    return names if len(names) > 1 else text


def parse_rank(text: str) -> int | float | str:
    """Return a fraction, an integer or 'same'."""
    if text == "same":
        return text
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a fraction such as 0.5, an integer, or 'same', got {text!r}"
        ) from None


def positive_int(text: str) -> int:
    """Return an integer of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def import_package(text: str) -> str:
    """Import a package and return its name."""
    try:
        importlib.import_module(text)
    except Exception as error:  # a package can raise anything while it is imported
        raise argparse.ArgumentTypeError(f"{text} cannot be imported: {error}") from error
    return text


def random_input(text: str) -> Tensor:
    """Return an input of a shape and dtype such as 1,77:int64: normal numbers, or zeros for integers."""
    import torch  # noqa: PLC0415 (it takes seconds, and --help and --version do not need it)

    sizes, _, dtype_name = text.partition(":")
    shape = [positive_int(size) for size in sizes.split(",")]
    dtype = getattr(torch, dtype_name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{dtype_name} is not a dtype of torch")
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.zeros(shape, dtype=dtype)
