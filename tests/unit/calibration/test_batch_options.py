"""transform= and max_samples=, wherever batches are taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxfact
from fxfact.errors import ArgumentError, ArgumentTypeError, CalibrationError

KINDS = ["channel_svd", "tucker"]


def endless(x: Tensor, size: int) -> Iterator[Tensor]:
    """The batches of x again and again."""
    while True:
        yield from x.split(size)


def as_records(x: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Batches with other names, dtype and layout than the model takes."""
    return [
        {"label": torch.zeros(len(part)), "image": (part * 2).permute(0, 2, 3, 1).double()} for part in x.split(size)
    ]


def to_images(batch: dict[str, Tensor]) -> Tensor:
    return batch["image"].permute(0, 3, 1, 2).float() / 2


def equal_statistics(one: fxfact.Statistics, other: fxfact.Statistics) -> bool:
    pairs = [(m, other.moments[path]) for path, m in one.moments.items()]
    sides = [
        (getattr(a, side).factors[0], getattr(b, side).factors[0]) for a, b in pairs for side in ("input", "output")
    ]
    return one.samples == other.samples and all(torch.equal(a, b) for a, b in sides)


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


Call = Callable[..., Any]


def call_calibrate(model: nn.Module, batches: Any, **options: Any) -> fxfact.Statistics:
    return fxfact.calibrate(model, batches, **options)


def call_factorize(model: nn.Module, batches: Any, **options: Any) -> nn.Module:
    return fxfact.factorize(model, KINDS, rank=0.5, calibration=batches, **options)


def call_budget(model: nn.Module, batches: Any, **options: Any) -> nn.Module:
    return fxfact.factorize(model, KINDS, budget=fxfact.Macs(0.7), calibration=batches, **options)


def call_plan(model: nn.Module, batches: Any, **options: Any) -> fxfact.Plan:
    return fxfact.plan(model, KINDS, budget=fxfact.Macs(0.7), calibration=batches, **options)


def call_apply(model: nn.Module, batches: Any, **options: Any) -> nn.Module:
    plan = fxfact.plan(model, KINDS, rank=0.5, calibration=[torch.ones(2, 3, 9, 9)])
    return fxfact.apply(plan, model, calibration=batches, **options)


def call_refit(model: nn.Module, batches: Any, **options: Any) -> nn.Module:
    return fxfact.refit(fxfact.factorize(model, KINDS, rank=0.5), model, batches, **options)[0]


def call_distill(model: nn.Module, batches: Any, **options: Any) -> nn.Module:
    small = fxfact.factorize(model, KINDS, rank=0.5)
    return fxfact.distill(small, model, batches, steps=2, **options)[0]


CALLS = [call_calibrate, call_factorize, call_budget, call_plan, call_apply, call_refit, call_distill]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, nn.Module):
        return equal_weights(one, other)
    return equal_statistics(one, other) if isinstance(one, fxfact.Statistics) else bool(one == other)


@pytest.mark.parametrize("call", CALLS)
def test_transformed_and_limited_batches_equal_those_batches(classifier: nn.Module, x: Tensor, call: Call) -> None:
    expected = call(classifier, [x[:6], x[6:12], x[12:15]])
    assert equal(expected, call(classifier, endless(x, 6), max_samples=15))
    assert equal(expected, call(classifier, as_records(x, 6), transform=to_images, max_samples=15))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"transform": 3}, ArgumentTypeError, "transform must be a function.*got int"),
        ({"max_samples": 0}, ArgumentError, "max_samples must be an int, at least 1, got 0"),
        ({"max_samples": 2.5}, ArgumentError, "max_samples must be an int"),
        ({"max_samples": True}, ArgumentError, "max_samples must be an int"),
        ({"transform": lambda batch: batch["img"]}, CalibrationError, "transform raised on batch 0: KeyError"),
        ({"transform": lambda batch: None}, CalibrationError, "batch 0: transform must return a tensor.*got NoneType"),
    ],
)
def test_bad_options_are_refused(
    classifier: nn.Module, x: Tensor, call: Call, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call(classifier, as_records(x, 12), **options)


@pytest.mark.parametrize("options", [{"transform": to_images}, {"max_samples": 3}])
def test_options_without_batches_are_refused(classifier: nn.Module, x: Tensor, options: dict[str, Any]) -> None:
    statistics = fxfact.calibrate(classifier, [x])
    words = f"{next(iter(options))} is only used with batches"
    for given in (None, statistics):
        for call in (fxfact.plan, fxfact.factorize):
            with pytest.raises(ArgumentError, match=words):
                call(classifier, rank=0.5, calibration=given, **options)  # type: ignore[operator]
    with pytest.raises(ArgumentError, match=words):
        fxfact.apply(fxfact.plan(classifier, rank=0.5), classifier, **options)


def test_options_hold_for_held_out_batches_too(classifier: nn.Module, x: Tensor) -> None:
    statistics = fxfact.calibrate(classifier, [x[:12]])
    asked = {"budget": fxfact.Macs(0.7), "calibration": statistics, "example_inputs": x[:1]}
    expected = fxfact.plan(classifier, KINDS, held_out=[x[12:17], x[17:20]], **asked)
    found = fxfact.plan(classifier, KINDS, held_out=as_records(x[12:], 5), transform=to_images, max_samples=8, **asked)
    assert found.measured_loss_increase == expected.measured_loss_increase
    assert found == expected


def test_no_batch_is_read_after_the_limit(classifier: nn.Module, x: Tensor) -> None:
    def loader() -> Iterator[Tensor]:
        yield from x.split(6)[:2]
        pytest.fail("a third batch was read")

    for samples in (7, 11, 12):
        assert fxfact.calibrate(classifier, loader(), max_samples=samples).samples == samples
    assert fxfact.calibrate(classifier, x.split(6), max_samples=999).samples == len(x)


def test_of_a_long_loader_the_first_1024_samples_are_read(x: Tensor) -> None:
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images = torch.randn(1100, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert fxfact.calibrate(tiny, endless(images, 100)).samples == 1024
    assert fxfact.calibrate(tiny, images.split(100), max_samples=None).samples == 1100
    plan = fxfact.plan(tiny, rank=0.5, calibration=endless(images, 100))
    assert plan.samples == 1024
    assert "learnt from 1,024 samples" in str(plan)
    assert fxfact.Plan.from_json(plan.to_json()) == plan


def test_what_is_behind_the_limit_does_not_matter(classifier: nn.Module, x: Tensor) -> None:
    broken = x.clone()
    broken[7:] = float("nan")
    assert fxfact.calibrate(classifier, broken.split(6), max_samples=7).samples == 7
    with pytest.raises(CalibrationError, match="batches: batch 1 contains NaN"):
        fxfact.calibrate(classifier, broken.split(6), max_samples=8)


class Scaled(nn.Sequential):
    """Takes an argument that all samples share, of another length than the batch."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(x if scale is None else x * scale.reshape(1, 3, 1, 1))


@pytest.fixture
def scaled() -> nn.Module:
    torch.manual_seed(0)
    return Scaled(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_transform_may_return_optional_arguments_by_place_or_name(scaled: nn.Module, x: Tensor) -> None:
    scale = torch.tensor([1.0, 2.0, 3.0])
    plain, by_place, by_name = (
        fxfact.calibrate(scaled, x.split(12), transform=transform, likelihood="gaussian", max_samples=15)
        for transform in (None, lambda x: (x, scale), lambda x: {"scale": scale, "x": x, "label": x})
    )
    expected = fxfact.calibrate(
        scaled, [(x[:12], scale), (x[12:15], scale)], example_inputs=(x, scale), likelihood="gaussian"
    )
    assert equal_statistics(by_place, expected)
    assert not equal_statistics(plain, expected)
    by_name_expected = fxfact.calibrate(
        scaled, [{"x": x[:12], "scale": scale}, {"x": x[12:15], "scale": scale}], likelihood="gaussian"
    )
    assert equal_statistics(by_name, by_name_expected)
    assert by_name.samples == by_place.samples


def test_samples_are_counted_in_what_the_model_takes(classifier: nn.Module, x: Tensor) -> None:
    boxes = torch.zeros(40, 4)  # of all objects in the images of a batch
    batches = [{"boxes": boxes, "x": part} for part in x.split(8)]
    assert equal_statistics(
        fxfact.calibrate(classifier, batches, max_samples=13), fxfact.calibrate(classifier, [x[:8], x[8:13]])
    )


# Names


@pytest.mark.parametrize("capture", ["trace", "modules"])
@pytest.mark.parametrize("with_example", [True, False])
def test_batch_with_other_keys_names_both_sides_and_the_way_out(
    classifier: nn.Module, x: Tensor, capture: Any, with_example: bool
) -> None:
    batches = [{"image": part, "label": torch.zeros(len(part))} for part in x.split(8)]
    options: dict[str, Any] = {"capture": capture, "example_inputs": x[:1] if with_example else None}
    words = (
        r"batch 0 has the keys image, label, and \w+\.forward\(\) takes x\. Pass transform=, a function that renames "
        r"them: transform=lambda batch: \{\*\*batch, 'x': batch\['image'\]\}"
    )
    for call in (call_calibrate, call_factorize, call_budget):
        with pytest.raises(CalibrationError, match=words):
            call(classifier, batches, **options)

    def advised(batch: Any) -> Any:
        return {**batch, "x": batch["image"]}

    found = fxfact.calibrate(classifier, batches, transform=advised, **options)
    assert equal_statistics(found, fxfact.calibrate(classifier, x.split(8)))


def test_every_missing_argument_is_found() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 8, 3)

        def forward(self, signal: Tensor, mask: Tensor, *, gain: float = 1.0) -> Tensor:
            return self.conv(signal * mask * gain).mean(2)

    class Optional(Two):
        def forward(self, signal: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(signal, mask)

    part = torch.randn(6, 2, 9)
    with pytest.raises(
        CalibrationError,
        match=r"keys signal, valid, and Two.forward\(\) takes signal, mask, gain.*'mask': batch\['valid'\]",
    ):
        fxfact.calibrate(Two().eval(), [{"signal": part, "valid": part}])
    with pytest.raises(
        CalibrationError,
        match=r"keys waves, and Optional.forward\(\) takes signal, mask\. .*'signal': batch\['waves'\]",
    ):
        fxfact.calibrate(Optional().eval(), [{"waves": part}])
    program = torch.export.export(Two().eval(), (), {"signal": part, "mask": part})
    with pytest.raises(CalibrationError, match=r"has the keys wave, mask, and .* takes signal, mask"):
        fxfact.calibrate(program, [{"wave": part, "mask": part}])


@pytest.mark.parametrize("batch", [object(), None, 3, "text"])
def test_batch_of_another_type_names_the_way_out(classifier: nn.Module, x: Tensor, batch: object) -> None:
    with pytest.raises(CalibrationError, match=r"a tuple or a mapping, got .*Pass transform="):
        fxfact.calibrate(classifier, [batch])  # type: ignore[list-item]
    found = fxfact.calibrate(classifier, [batch], transform=lambda _: x)  # type: ignore[list-item]
    assert equal_statistics(found, fxfact.calibrate(classifier, [x]))


# Progress and single samples


class Stream(IterableDataset[Tensor]):
    """A data set without length."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.cycle(self.x)


@pytest.mark.parametrize(
    ("loader", "max_samples", "total"),
    [
        (lambda x: DataLoader(Stream(x), batch_size=4), 10, 3),
        (lambda x: endless(x, 5), 10, 2),
        (lambda x: iter(x.split(6)), None, None),
        (lambda x: x.split(6), None, 4),
        (lambda x: x.split(6), 13, 3),
        (lambda x: x.split(6), 999, 4),
        (lambda x: DataLoader(TensorDataset(x), batch_size=5), None, 5),
        (lambda x: [x[:20], x[20:]], 24, 2),
        (lambda x: [x[:4], x[4:]], 20, 2),
    ],
)
@pytest.mark.parametrize("with_example", [True, False])
def test_progress_bar_has_a_total(
    classifier: nn.Module, x: Tensor, loader: Any, max_samples: int | None, total: int | None, with_example: bool
) -> None:
    shown: list[Any] = []

    def bar(iterable: Iterable[Any], *, total: int | None, desc: str) -> Iterable[Any]:
        shown.append((desc, total))
        return iterable

    example = x[:1] if with_example else None
    found = fxfact.calibrate(classifier, loader(x), max_samples=max_samples, progress=bar, example_inputs=example)
    assert shown == [("calibrating", total)]
    assert found.samples == min(max_samples or len(x), len(x))


def test_statistics_of_one_sample_warn(classifier: nn.Module, x: Tensor, recwarn: pytest.WarningsRecorder) -> None:
    for call in (call_calibrate, call_factorize, call_budget):
        with pytest.warns(UserWarning, match=r"there is only one sample.*Pass a few hundred") as record:
            call(classifier, [x[:1]])
        assert record[0].filename == __file__
        with pytest.warns(UserWarning, match="there is only one sample"):
            call(classifier, x.split(6), max_samples=1)
    recwarn.clear()
    fxfact.calibrate(classifier, x[:2].split(1))
    assert not recwarn.list
