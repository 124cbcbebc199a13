"""One pass over the data, forward and backward: every convolution shows what it is given and what its output means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxfact.calibration.batches import Batches, iter_batches, run_batch
from fxfact.calibration.moments import MomentAccumulator, Window
from fxfact.calibration.outputs import Draw, Likelihood, float_tensors_of, likelihood_for
from fxfact.calibration.statistics import Statistics
from fxfact.capture import Captured
from fxfact.errors import CalibrationError
from fxfact.graph import weight_at
from fxfact.utils import Progress, StorageIndex, alias_copy, no_reduced_precision, to_eval, with_progress

MAX_SEED = 2**23 - 1  # with the number of a sample in the other 40 bits a generator's seed
_POSITIONS = 64  # patches of a sample that are looked at, of each convolution
_DRAWN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
_backward, _converted = torch.ops.aten.convolution_backward.default, torch.ops.aten._to_copy.default


@torch.inference_mode(False)
def collect_statistics(
    captured: Captured,
    batches: Batches,
    *,
    likelihood: object = None,
    seed: int = 0,
    progress: Progress = False,
) -> Statistics:
    """The statistics of a captured network's convolutions, in evaluation mode, on a private copy.

    Random draws are keyed by ``seed`` and the number of the sample, so that batch sizes do not matter. Where
    ``torch.distributed`` is initialised, sums are all-reduced and every process gets the same; the samples of rank r of
    w are then taken for numbers r, r + w, r + 2w, …, as ``DistributedSampler`` deals them. Raises CalibrationError.
    """
    network = _prepared(captured.network)
    leaders = [site for site in captured.sites if site.tied_to is None]
    weights = {site.path: weight for site in leaders if (weight := weight_at(network, site.path)) is not None}
    sums = {
        site.path: MomentAccumulator(site.spec, weights[site.path].device) for site in leaders if site.path in weights
    }
    _ask_for_gradients(weights)
    collector = _Collector(sums, weights)
    drawing, known = _Drawing(seed), None
    output_sums = torch.zeros(3, dtype=torch.float64, device="cpu")  # count, sum, squares
    for batch in with_progress(iter_batches(network, batches, captured.example_inputs), None, "calibrating", progress):
        with torch.enable_grad():
            with collector:
                output = run_batch(network, batch)
            known = known or likelihood_for(likelihood, output)
            drawing.begin(known.samples(output, batch))
            tensors, gradients = known.pull(output, drawing.normal)
            if not all(bool(torch.isfinite(t.detach()).all()) for t in tensors):
                raise CalibrationError("calibration: the model's own output, or its loss, is NaN or Inf on this data")
            if not any(tensor.requires_grad for tensor in tensors):
                raise CalibrationError(
                    "calibration: no gradient leads from the output to a convolution. Where forward detaches its "
                    "output, or makes it of gradients of its own, plan without data."
                )
            output_sums += moments_of([tensor.detach() for tensor in float_tensors_of(output)])
            pulled = [k for k, tensor in enumerate(tensors) if tensor.requires_grad]
            with collector.on(drawing.fractions):
                torch.autograd.backward([tensors[k] for k in pulled], [gradients[k] for k in pulled])
        drawing.end()
        collector.forget()
    if known is None:
        raise CalibrationError("calibration: there is no batch. Pass some hundred samples.")
    counted = torch.tensor([float(drawing.samples)], dtype=torch.float64, device="cpu")
    all_reduce([counted, output_sums, *(tensor for found in sums.values() for tensor in found.tensors)])
    return _statistics(sums, known, float(counted), output_sums)


def _statistics(
    sums: Mapping[str, MomentAccumulator], known: Likelihood, samples: float, output_sums: Tensor
) -> Statistics:
    variance = variance_of(output_sums)
    for path, found in sums.items():
        if not all(bool(tensor.isfinite().all()) for tensor in found.tensors):
            raise CalibrationError(
                f"calibration: at {path} an input or a gradient is NaN or Inf, though the output is not, as of a "
                "square root at zero. Drop the sample (a blank one?), or keep the root away from zero."
            )
    metrics = {path: found.metric(samples, known.scale(variance)) for path, found in sums.items()}
    if metrics and not any(metrics.values()):
        raise CalibrationError(
            "calibration: the gradients of the output reach no convolution. Pass a likelihood that depends on them, or "
            "plan without data."
        )
    return Statistics(
        samples=int(samples),
        likelihood=known.name,
        shrinkage=known.shrinkage,
        specs={path: found.spec for path, found in sums.items() if metrics[path] is not None},
        moments={path: metric for path, metric in metrics.items() if metric is not None},
    )


class _Drawing:
    """Random numbers of every sample, from its own generator, whatever batch it comes in."""

    def __init__(self, seed: int) -> None:
        self._seed, self.samples = seed, 0
        self._rank, self._world = rank_and_world_size()
        self._generators: list[torch.Generator] = []
        self.fractions = torch.empty(0, device="cpu")

    def begin(self, count: int) -> None:
        """The next ``count`` samples: their positions, and generators for what ``normal`` draws. Raises
        CalibrationError for none.
        """
        if not count:
            raise CalibrationError("calibration: the output of a batch has no samples. Drop such batches.")
        numbers = [(self.samples + k) * self._world + self._rank for k in range(count)]
        self._generators = [torch.Generator().manual_seed((self._seed << 40) + number) for number in numbers]
        self.fractions = torch.stack([torch.rand(_POSITIONS, generator=own, **_DRAWN) for own in self._generators])

    def end(self) -> None:
        """The samples are done with."""
        self.samples += len(self._generators)

    @property
    def normal(self) -> Draw:
        """Standard normal numbers in the shape of a tensor, the first axis being the samples'."""

        def draw(tensor: Tensor) -> Tensor:
            if len(tensor) != len(self._generators):
                raise CalibrationError(
                    f"calibration: outputs have {len(tensor)} and {len(self._generators)} samples on their first axis"
                )
            rows = [torch.randn(tensor.shape[1:], generator=own, **_DRAWN) for own in self._generators]
            return torch.stack(rows).to(tensor.device)

        return draw


class _Collector(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the backward pass come to every convolution, which gets input and gradient there; spares their weights'.
    Forward it sees the weights become others of another type, as under autocast, which last until then.
    """

    supports_higher_order_operators = True

    def __init__(self, sums: Mapping[str, MomentAccumulator], weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sums, self._fractions = sums, torch.empty(0)
        self._weights, self._converted = StorageIndex(weights.items()), StorageIndex()

    def on(self, fractions: Tensor) -> _Collector:
        """To look at the patches of these samples at these fractions of all positions."""
        self._fractions = fractions
        return self

    def forget(self) -> None:
        """What was of a batch: it is gone."""
        self._fractions, self._converted = torch.empty(0), StorageIndex()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not _backward or not len(self._fractions):  # a backward pass of the model's own
            result = func(*args, **(kwargs or {}))
            if func is _converted and (path := self._weights.name_of(args[0])) is not None:
                self._converted.add(path, result)
            return result
        gradient, input, weight, biases, stride, padding, dilation, transposed, extra, groups, mask = args
        path = self._weights.name_of(weight) or self._converted.name_of(weight)
        if path is not None and len(input):
            with torch.no_grad(), no_reduced_precision(input.device):
                order = input.ndim - 2
                window = Window(weight.shape[2:], *(_per_axis(v, order) for v in (stride, padding, dilation)))
                samples = self._fractions
                samples = samples if len(input) % len(samples) == 0 else samples[:1]
                self._sums[path].add(input, gradient, window, samples)
        if not mask[0]:
            return None, None, None
        only_input = [True, False, False]
        return func(gradient, input, weight, biases, stride, padding, dilation, transposed, extra, groups, only_input)


def _prepared(network: nn.Module) -> nn.Module:
    """A private copy, in evaluation mode, in which nothing but weights will ask for gradients."""
    return to_eval(alias_copy(network)).requires_grad_(requires_grad=False)


def _ask_for_gradients(weights: Mapping[str, Tensor]) -> None:
    """Have the weights of a private copy, buffers too, ask for gradients, so that every convolution gets one, each in
    memory of its own, by which it is known.
    """
    held = StorageIndex()
    for path, weight in weights.items():
        if held.name_of(weight) is not None:
            weight.data = weight.detach().clone()
        held.add(path, weight)
        weight.requires_grad_(weight.is_floating_point())


def _per_axis(values: Sequence[int], order: int) -> list[int]:
    return list(values) * order if len(values) == 1 else list(values)


def moments_of(tensors: Sequence[Tensor]) -> Tensor:
    """How many numbers they have, their sum, and that of their squares."""
    sums = [
        torch.stack([t.new_tensor(t.numel()).double(), t.double().sum(), t.double().square().sum()]) for t in tensors
    ]
    return torch.stack(sums).sum(dim=0).cpu()


def variance_of(moments: Tensor) -> float:
    """That of the numbers whose ``moments_of`` these are."""
    count, total, squares = moments.tolist()
    return max(0.0, squares / count - (total / count) ** 2) if count else 0.0


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this one, and how many there are; (0, 1) where ``torch.distributed`` is not initialised."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Sum them over all processes, in place, where ``torch.distributed`` is initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for tensor in tensors:
        on_device = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        dist.all_reduce(on_device)
        tensor.copy_(on_device)
