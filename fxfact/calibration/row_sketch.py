"""Sums of second moments: as matrices, or as the rows that they are sums of where these are fewer."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fxfact.conv import KroneckerMoment, LowRankMoment

MAX_ROWS = 2048  # of a sum that is held by its rows


class MomentSum(ABC):
    """The sum of the outer products of rows."""

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The tensors that hold the sum. Those of two sums can be added up."""

    @abstractmethod
    def add(self, rows: Tensor, weight: float) -> None:
        """Add the outer products of rows (groups, count, channels, positions), times ``weight``."""

    @abstractmethod
    def moment(self, divisor: Tensor | float) -> KroneckerMoment:
        """Return the sum divided by ``divisor``, in single precision."""

    @property
    def is_zero(self) -> bool:
        """Whether nothing but zeros was added."""
        return not any(float(tensor.abs().max()) > 0 for tensor in self.tensors)


class RowSketch(MomentSum):
    """Holds the rows themselves, up to ``MAX_ROWS`` of them, in single precision. The sum is then exact.

    Further rows are added to those that are there, with random signs. The outer products of different rows then cancel
    in the mean, and the sum is right in expectation (count sketch: Charikar, Chen and Farach-Colton 2002). The place
    and the sign of a row depend on its number alone, so batch sizes do not matter.

    Args:
        size: The length of a row.
        device: Where to hold the rows.
        rank: The number of this process. Processes begin at different places and draw different signs.
        world_size: The number of processes.
    """

    def __init__(self, size: int, device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        self._rows = torch.zeros(MAX_ROWS, size, dtype=torch.float32, device=device)
        self._count, self._first, self._rank = 0, MAX_ROWS * rank // world_size, rank

    @property
    def tensors(self) -> list[Tensor]:
        """The rows."""
        return [self._rows]

    def add(self, rows: Tensor, weight: float) -> None:
        """Add rows (1, count, channels, 1) times the square root of ``weight``."""
        flat = rows.flatten(2)[0].float() * weight**0.5
        while len(flat):
            block, place = divmod(self._count, MAX_ROWS)
            taken, flat = flat[: MAX_ROWS - place], flat[MAX_ROWS - place :]
            signs = self._signs(block)[place : place + len(taken), None].to(taken)
            places = torch.arange(place, place + len(taken), device=taken.device)
            self._rows.index_add_(0, (places + self._first) % MAX_ROWS, taken * signs)
            self._count += len(taken)

    def moment(self, divisor: Tensor | float) -> LowRankMoment:
        """Return the sum divided by ``divisor``."""
        used = self._rows.abs().amax(dim=1) > 0
        return LowRankMoment(self._rows[used] / float(divisor) ** 0.5)

    def _signs(self, block: int) -> Tensor:
        """Return the signs of a block of rows. Those of the first block of the first process do not matter."""
        generator = torch.Generator().manual_seed((block << 12) + self._rank)
        return torch.randint(2, (MAX_ROWS,), generator=generator, device="cpu") * 2 - 1
