"""Sums of second moments that are held by their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fxfact.calibration.row_sketch import MAX_ROWS, RowSketch
from tests.support import apart

SIZE = 6
CPU = torch.device("cpu")


def rows_of(count: int) -> Tensor:
    rows = torch.randn(count, SIZE, generator=torch.Generator().manual_seed(count))
    return rows * torch.linspace(1, 3, SIZE)


def sketched(parts: list[Tensor], weight: float = 1.0, rank: int = 0, world_size: int = 1) -> RowSketch:
    sketch = RowSketch(SIZE, CPU, rank, world_size)
    for part in parts:
        sketch.add(part[None, :, :, None], weight)
    return sketch


def test_few_rows_give_the_exact_moment() -> None:
    rows = rows_of(100)
    sketch = sketched([rows[:40], rows[40:]], weight=2.5)
    assert apart(2.5 * rows.T @ rows / 7, sketch.moment(7.0).factors[0][0]) < 1e-6
    assert sketch.moment(7.0).rows.shape == (100, SIZE)
    assert RowSketch(SIZE, CPU).is_zero
    assert not sketch.is_zero


def test_more_rows_than_are_held_give_the_moment_on_average() -> None:
    rows = rows_of(5 * MAX_ROWS + 7)
    sketch = sketched([rows])
    assert sketch.moment(1.0).rows.shape[0] == MAX_ROWS
    assert apart(rows.T @ rows, sketch.moment(1.0).factors[0][0]) < 0.1


def test_batch_sizes_do_not_matter() -> None:
    rows = rows_of(2 * MAX_ROWS + 100)
    whole, parts = sketched([rows]), sketched(list(rows.split(999)))
    assert apart(whole.tensors[0], parts.tensors[0]) < 1e-6


def test_the_sums_of_processes_add_up() -> None:
    rows = rows_of(300)
    one, other = sketched([rows[:150]], rank=0, world_size=2), sketched([rows[150:]], rank=1, world_size=2)
    one.tensors[0].add_(other.tensors[0])
    assert apart(rows.T @ rows, one.moment(1.0).factors[0][0]) < 1e-6
