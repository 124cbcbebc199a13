"""What outputs mean is read from their values: their distribution, and the axes of samples and classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfact.calibration.output_parts import OutputPart
from fxfact.calibration.output_samples import OutputSamples
from fxfact.calibration.outputs import read_outputs
from fxfact.errors import CalibrationError


class Returns(nn.Module):
    """Returns a function of its input."""

    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.read(x)


def _read(read: Callable[[Tensor], Any], x: Tensor, request: object = None) -> tuple[OutputPart, ...]:
    return read_outputs(Returns(read).eval(), x.split(16), request)


def _kinds(parts: tuple[OutputPart, ...]) -> dict[str, str]:
    """Return for each part its distribution and form."""
    return {
        part.name: "left out"
        if part.distribution is None
        else " ".join(filter(None, (part.distribution.name, getattr(part.distribution, "form", ""))))
        for part in parts
    }


@pytest.fixture
def logits() -> Tensor:
    """Return logits (64, 10) like those of a trained classifier: a clear winner for most samples."""
    generator = torch.Generator().manual_seed(0)
    winners = torch.randint(0, 10, (64,), generator=generator)
    return 2 * torch.randn(64, 10, generator=generator) + 9 * nn.functional.one_hot(winners, 10)


def test_logits_and_their_readings_are_categorical(logits: Tensor) -> None:
    assert _kinds(_read(lambda x: x, logits)) == {"": "categorical logits"}
    assert _kinds(_read(lambda x: 20 * x, logits)) == {"": "categorical logits"}
    assert _kinds(_read(lambda x: x.relu(), logits)) == {"": "categorical logits"}
    assert _kinds(_read(lambda x: x.softmax(1), logits)) == {"": "categorical probabilities"}
    assert _kinds(_read(lambda x: (20 * x).softmax(1), logits)) == {"": "categorical probabilities"}
    assert _kinds(_read(lambda x: x.log_softmax(1), logits)) == {"": "categorical log-probabilities"}
    assert _kinds(_read(lambda x: (x - 3).sigmoid(), logits)) == {"": "bernoulli probabilities"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_read_alike(logits: Tensor, dtype: torch.dtype) -> None:
    assert _kinds(_read(lambda x: x.softmax(1).to(dtype), logits)) == {"": "categorical probabilities"}
    assert _kinds(_read(lambda x: x.log_softmax(1).to(dtype), logits)) == {"": "categorical log-probabilities"}
    assert _kinds(_read(lambda x: x.to(dtype), logits)) == {"": "categorical logits"}


@pytest.mark.parametrize(
    ("read", "sample_axis", "channel_axis", "per_sample"),
    [
        (lambda x: torch.stack([x.log_softmax(1)] * 3), 1, 2, 1),  # time-major, as CTC has it
        (lambda x: x[:, None, None].expand(-1, 4, 4, -1).softmax(3), 0, 3, 1),  # classes last
        (lambda x: x[:, :, None, None].expand(-1, -1, 4, 4).softmax(1), 0, 1, 1),
        (lambda x: x.softmax(1).repeat_interleave(5, 0), 0, 1, 5),  # predictions of a sample one after another
        (lambda x: torch.stack([x, x.roll(1, 1)], 2), 0, 1, 1),  # logits at every position
        (lambda x: torch.stack([x, x.roll(1, 1), x], 1), 0, 2, 1),
        (lambda x: x.softmax(1).T, 1, 0, 1),
    ],
)
def test_axes_of_samples_and_classes_are_found(
    logits: Tensor, read: Callable[[Tensor], Tensor], sample_axis: int, channel_axis: int, per_sample: int
) -> None:
    (part,) = _read(read, logits)
    assert part.distribution is not None
    assert part.distribution.name == "categorical"
    assert (part.sample_axis, part.channel_axis, part.per_sample) == (sample_axis, channel_axis, per_sample)
    assert part.view(read(logits[:16])).shape[:2] == (16, 10)


def test_view_writes_through_to_the_tensor(logits: Tensor) -> None:
    def read(x: Tensor) -> Tensor:
        return torch.stack([x.log_softmax(1)] * 3)

    (part,) = _read(read, logits)
    whole = torch.zeros_like(read(logits))
    part.view(whole).copy_(part.view(read(logits)))
    torch.testing.assert_close(whole, read(logits))


def test_numbers_without_a_clear_winner_are_gaussian() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    for read in (
        lambda x: x,
        lambda x: nn.functional.normalize(x, dim=1),  # embeddings
        lambda x: nn.functional.layer_norm(x, (32,)),
        lambda x: x.relu(),  # features
        lambda x: 300 * x[:, :4].sigmoid(),  # boxes in pixels
        lambda x: 100 + 40 * x[:, :1] + 10 * x[:, 1:11],  # landmarks that move together
        lambda x: 30 * x[:, :2],
        lambda x: x[:, 0],  # one number for each sample
        lambda x: (x / 4 + 0.5).clamp(0, 1).reshape(-1, 1, 4, 8),  # pictures
    ):
        assert _kinds(_read(read, x)) == {"": "gaussian"}, read


def test_coordinates_are_no_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = 100 * torch.rand(1, 2, 200, generator=generator)
    x = torch.randn(64, 4, 200, generator=generator)
    assert _kinds(_read(lambda x: torch.cat([anchors + 3 * x[:, :2], 20 + 3 * x[:, 2:]], 1), x)) == {"": "gaussian"}


def test_maps_of_logits_are_categorical() -> None:
    generator = torch.Generator().manual_seed(0)
    winners = torch.randint(0, 5, (64, 6, 6), generator=generator)
    winners[:, :3] = 0  # background everywhere
    x = torch.randn(64, 5, 6, 6, generator=generator) + 6 * nn.functional.one_hot(winners, 5).movedim(3, 1)
    assert _kinds(_read(lambda x: x, x)) == {"": "categorical logits"}
    assert _kinds(_read(lambda x: x.movedim(1, 3), x)) == {"": "categorical logits"}


def test_axes_of_space_and_time_hold_no_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(64, 2, 512, generator=generator).cumsum(2)
    assert _kinds(_read(lambda x: x, waves)) == {"": "gaussian"}
    assert _kinds(_read(lambda x: 20 * x[:, 0].sigmoid(), waves)) == {"": "gaussian"}


def test_heavy_tails_are_no_logits() -> None:
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    assert _kinds(_read(lambda x: 3 * x**3, x)) == {"": "gaussian"}


def test_two_classes_are_told_from_two_numbers() -> None:
    x = 4 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    assert _kinds(_read(lambda x: torch.cat([x, -x], 1), x)) == {"": "categorical logits"}
    assert _kinds(_read(lambda x: torch.cat([x, x + 1], 1), x)) == {"": "gaussian"}


@dataclass
class Detections:
    """An output like those of model libraries."""

    scores: Tensor
    boxes: Tensor
    labels: Tensor


def test_every_tensor_of_an_output_is_a_part(logits: Tensor) -> None:
    def read(x: Tensor) -> dict[str, Any]:
        boxes = 300 * (x[:, :4] / 9).sigmoid()
        return {
            "found": Detections(x.softmax(1), boxes, x.argmax(1)),
            "anchors": [torch.arange(len(x) * 0 + 8.0), torch.ones(len(x), 3)],
            "spectrum": torch.complex(x, x),
        }

    assert _kinds(_read(read, logits)) == {
        "found.scores": "categorical probabilities",
        "found.boxes": "gaussian",
        "found.labels": "left out",
        "anchors.0": "left out",
        "anchors.1": "left out",
        "spectrum": "left out",
    }
    reasons = {part.name: part.reason for part in _read(read, logits)}
    assert reasons["found.labels"] == "int64"
    assert reasons["anchors.0"] == "without an axis that follows the batch size"
    assert reasons["anchors.1"] == "equal for all samples"
    assert reasons["spectrum"] == "complex64"


def test_boxes_and_scores_in_one_tensor_are_two_parts(logits: Tensor) -> None:
    def read(x: Tensor) -> Tensor:
        boxes, scores = 300 * (x[:, :4] / 9).sigmoid(), (x - 3).sigmoid()
        return torch.cat([boxes, scores], 1)[:, :, None].expand(-1, -1, 5)

    boxes, scores = _read(read, logits)
    assert (boxes.channels, scores.channels) == ((0, 4), (4, 14))
    assert str(scores) == "channels 4 to 13 of (16, 14, 5) Bernoulli"
    assert str(boxes) == "channels 0 to 3 of (16, 14, 5) Gaussian by channel"
    last = _read(lambda x: read(x).transpose(1, 2), logits)
    assert [part.channel_axis for part in last] == [2, 2]


def test_hidden_states_beside_logits_are_left_out(logits: Tensor) -> None:
    parts = _read(lambda x: {"logits": x, "hidden_states": [x[:, :5], x]}, logits)
    assert list(_kinds(parts).values()) == ["categorical logits", "left out", "left out"]


def test_several_outputs_are_on_one_scale(logits: Tensor) -> None:
    scores, boxes = _read(lambda x: (x.softmax(1), x[:, :4, None].expand(-1, -1, 1000)), logits)
    assert scores.distribution is not None
    assert boxes.distribution is not None
    carried = [
        part.weight * part.distribution.information(part.view(tensor).double())
        for part, tensor in ((scores, logits.softmax(1)), (boxes, logits[:, :4, None].expand(-1, -1, 1000)))
        if part.distribution is not None
    ]
    assert carried[0] == pytest.approx(carried[1])
    assert scores.weight == 1  # carries least
    assert _read(lambda x: x[:, :4, None].expand(-1, -1, 1000), logits)[0].weight == 1  # alone, in nats


def test_reading_does_not_depend_on_the_batch_size(logits: Tensor) -> None:
    network = Returns(lambda x: (x.softmax(1), 300 * x[:, :4].sigmoid())).eval()
    kinds = [read_outputs(network, logits.split(size)) for size in (64, 16, 7, 1)]
    for parts in kinds[1:]:
        assert [part.distribution for part in parts] == [part.distribution for part in kinds[0]]
        assert [part.weight for part in parts] == pytest.approx([part.weight for part in kinds[0]])


def test_large_maps_are_read_from_fewer_samples(logits: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(x: Tensor) -> Tensor:
        return x.softmax(1)[:, :, None].expand(-1, -1, 4)

    monkeypatch.setattr("fxfact.calibration.output_samples._MOST_NUMBERS", 16 * 40)
    outputs = OutputSamples(Returns(read).eval(), logits.split(16))
    (part,) = _read(read, logits)
    assert outputs.values(part).shape == (16, 10, 4)
    assert _kinds((part,)) == {"": "categorical probabilities"}


def test_one_sample_is_enough_to_read() -> None:
    (part,) = read_outputs(Returns(lambda x: x.softmax(1)).eval(), [torch.randn(1, 10)])
    assert part.distribution is not None
    assert part.sample_axis == 0


def test_samples_that_are_all_equal_are_no_evidence() -> None:
    assert _kinds(_read(lambda x: (2 * x, x.sigmoid()), torch.ones(32, 4))) == {"0": "gaussian", "1": "gaussian"}


def test_caller_can_name_distributions(logits: Tensor) -> None:
    def read(x: Tensor) -> dict[str, Any]:
        return {"scores": x, "boxes": 30 * x[:, :4], "aux": x.sigmoid()}

    request = {"scores": "bernoulli", "boxes": "gaussian", "aux": None}
    expected = {"scores": "bernoulli logits", "boxes": "gaussian", "aux": "left out"}
    assert _kinds(_read(read, logits, request)) == expected
    assert _kinds(_read(read, logits, ["bernoulli", "gaussian", None])) == expected
    assert _kinds(_read(read, logits, {"aux": None})) == {
        "scores": "categorical logits",
        "boxes": "gaussian",
        "aux": "left out",
    }
    assert _kinds(_read(lambda x: x / 9, logits, "categorical")) == {"": "categorical logits"}


def test_parts_are_written_and_read(logits: Tensor) -> None:
    def read(x: Tensor) -> Any:
        return {"s": torch.stack([x.log_softmax(1)] * 3), "b": 300 * x[:, :4].sigmoid(), "i": x.argmax(1)}

    parts = _read(read, logits)
    again = tuple(OutputPart.from_json(part.to_json()) for part in parts)
    assert list(map(str, again)) == [
        "s (3, 16, 10) categorical (log-probabilities) on axis 2",
        "b (16, 4) Gaussian by channel",
        "i (16,) left out: int64",
    ]
    assert _read(read, logits, again) == parts
    with pytest.raises(CalibrationError, match=r"describe an output s .*, but the model returns"):
        _read(lambda x: x, logits, again)


@pytest.mark.parametrize(
    ("read", "request_", "message"),
    [
        (
            lambda x: x.argmax(1),
            None,
            r"measured by: \(16,\) left out: int64.*the logits instead of their argmax",
        ),
        (lambda x: "text", None, "no tensors"),
        (lambda x: {"a": x, "b": x / 0 * 0}, None, "output 'b' is NaN or Inf"),
        (lambda x: x, "poisson", "likelihood cannot be 'poisson'"),
        (lambda x: {"a": x}, {"a": "poisson"}, r"likelihood\['a'\] cannot be 'poisson'"),
        (lambda x: {"a": x}, {"b": "gaussian"}, r"there is no output 'b'. The model returns 'a'"),
        (lambda x: (x, x), ["gaussian"], "has 1 entries, but the model returns 2 outputs: 0, 1"),
        (lambda x: {"a": x.argmax(1)}, {"a": "gaussian"}, "'a' cannot be 'gaussian', because it is int64"),
        (lambda x: x[:, :1], "categorical", "has no axis of classes"),
        (lambda x: x if len(x) == 16 else {"a": x}, None, None),
    ],
)
def test_outputs_that_cannot_be_read_are_refused(
    logits: Tensor, read: Callable[[Tensor], Any], request_: object, message: str | None
) -> None:
    if message is None:
        with pytest.raises(CalibrationError, match="change from batch to batch"):
            read_outputs(Returns(read).eval(), logits.split(24), request_)
        return
    with pytest.raises(CalibrationError, match=message):
        _read(read, logits, request_)


def test_shape_that_changes_from_batch_to_batch_is_refused(logits: Tensor) -> None:
    def read(x: Tensor) -> dict[str, Tensor]:
        return {"a": x if len(x) > 10 else x[:, :, None]}

    with pytest.raises(CalibrationError, match=r"output 'a': its shape changes from \(16, 10\) to \(8, 10, 1\)"):
        read_outputs(Returns(read).eval(), [logits[:16], logits[16:24]])
