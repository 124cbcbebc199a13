"""How batches become arguments of a model, and which are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxfact
from fxfact.calibration import split_held_out
from fxfact.errors import CalibrationError
from tests.support import Classifier


def raising_loader(x: Tensor) -> Iterator[Tensor]:
    yield x
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (lambda x: [], "no batch"),
        (lambda x: x, "iterable of batches"),
        (lambda x: [x, x * float("nan")], "batch 1 contains NaN"),
        (raising_loader, "raised after 1 batches.*disk is gone"),
        (lambda x: ["abc"], "a batch must be a tensor"),
        (lambda x: [x, x[:, :2]], "fails on a batch"),
        (lambda x: [x, x[:0]], "batch 1 contains no samples"),
        (lambda x: None, "must be an iterable of batches, got NoneType"),
        (lambda x: fxfact.calibrate(Classifier(), [x]), "must be an iterable of batches, got Statistics"),
    ],
)
def test_batches_that_a_model_cannot_take_are_refused(
    model: nn.Module, x: Tensor, batches: Callable[[Tensor], object], words: str
) -> None:
    with pytest.raises(CalibrationError, match=words):
        fxfact.calibrate(model, batches(x))


def test_batches_must_be_an_iterable_of_batches(model: nn.Module, x: Tensor) -> None:
    for given in (TensorDataset(x), 7):
        for example in (x[:1], None):
            with pytest.raises(CalibrationError, match="must be an iterable of batches"):
                fxfact.calibrate(model, given, example_inputs=example)  # type: ignore[arg-type]


def test_batches_that_do_not_run_are_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"on the meta device.*Load its weights"):
        fxfact.calibrate(copy.deepcopy(model).to("meta"), [x])
    with pytest.raises(
        CalibrationError, match=r"fails on a batch of \[\(.*\)\]: .*Pass batches that the model accepts"
    ):
        fxfact.calibrate(model, [x, x[:, :1]])


def test_labels_in_batches_are_ignored(model: nn.Module, x: Tensor) -> None:
    labels = torch.zeros(len(x), dtype=torch.long)
    one = fxfact.calibrate(model, [x])
    for batch in ((x, labels), [x, labels], {"x": x, "labels": labels}):
        other = fxfact.calibrate(model, [batch])
        assert all(torch.equal(m.output.factors[0], other.moments[p].output.factors[0]) for p, m in one.moments.items())


def test_batches_of_an_exported_program_are_cut_to_its_arguments(model: nn.Module, x: Tensor) -> None:
    program = torch.export.export(model, (x[:8],))
    labelled = [(part, torch.zeros(8).long()) for part in x.split(8)]
    for given in (labelled, x.split(8)):
        one, other = fxfact.calibrate(model, given), fxfact.calibrate(program, given)
        assert one.samples == other.samples == len(x)
        assert one.moments.keys() == other.moments.keys()

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return self.inner(x + y - z)

    three = torch.export.export(Three().eval(), (x[:8], x[:8]), {"z": x[:8]})
    with pytest.raises(CalibrationError, match="missing 1 required"):
        fxfact.calibrate(three, [(part, part, 0) for part in x.split(8)])
    named = [{"x": part, "y": part, "z": part, "label": 0} for part in x.split(8)]
    assert fxfact.calibrate(three, named).samples == len(x)
    three = torch.export.export(Three().eval(), (x[:8], x[:8], x[:8]))
    assert fxfact.calibrate(three, [(part, part, part, 0) for part in x.split(8)]).samples == len(x)


def test_loader_that_can_be_iterated_once_loses_no_batch(model: nn.Module, x: Tensor) -> None:
    class Stream(IterableDataset[Tensor]):
        def __init__(self) -> None:
            self.coming = iter(x)

        def __iter__(self) -> Iterator[Tensor]:
            return self.coming

    found = fxfact.calibrate(model, DataLoader(Stream(), batch_size=4))
    assert found.samples == len(x)
    assert fxfact.plan(model, rank=0.5, calibration=DataLoader(Stream(), batch_size=4)).rewrites


@pytest.mark.parametrize(("count", "held_out"), [(2, [1]), (3, [2]), (4, [3]), (9, [3, 7])])
def test_every_fourth_batch_is_held_out(count: int, held_out: list[int]) -> None:
    batches = list(torch.arange(count).split(1))
    learned, measured = split_held_out(batches)
    assert [int(batch) for batch in measured] == held_out
    assert [int(batch) for batch in learned] == [k for k in range(count) if k not in held_out]


def test_single_batch_cannot_be_held_out() -> None:
    with pytest.raises(CalibrationError, match=r"at least two batches are needed, got 1\. Pass smaller batches"):
        split_held_out([torch.ones(1)])
