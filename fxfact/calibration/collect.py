"""Collects the statistics of a network in one forward and one backward pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from fxfact.calibration.backward import GradientCollector, run_backward
from fxfact.calibration.batches import Batches, BatchReader, iter_batches, peek_batches, run_batch
from fxfact.calibration.likelihood import Likelihood, OutputLikelihood, parts_of, resolve_likelihood
from fxfact.calibration.moments import MomentAccumulator
from fxfact.calibration.output_samples import READING_SAMPLES
from fxfact.calibration.processes import all_reduce, rank_and_world_size, samples_of_all_processes
from fxfact.calibration.statistics import Statistics
from fxfact.capture import Captured, ExampleInputs
from fxfact.errors import CalibrationError
from fxfact.graph import weight_at
from fxfact.utils import (
    Progress,
    StorageIndex,
    alias_copy,
    check_finite_state,
    dequantize_parameters,
    is_wrapper,
    tensors_of,
    to_eval,
    warn_caller,
    with_progress,
)

MAX_SEED = 2**23 - 1
_POSITIONS = 64  # of each sample and convolution at which patches are taken
_CPU_FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever PyTorch's defaults are


@torch.inference_mode(False)
def collect_statistics(
    captured: Captured,
    batches: Batches,
    *,
    likelihood: object = None,
    seed: int = 0,
    progress: Progress = None,
) -> Statistics:
    """Return the statistics of a captured network's convolutions.

    The network runs in evaluation mode, on a private copy. Random numbers depend on ``seed`` and on the number of the
    sample, so batch sizes do not matter. If ``torch.distributed`` is initialized, the sums are all-reduced and every
    process returns the same statistics. Sample k of rank r of w then counts as sample k · w + r, which is how
    ``DistributedSampler`` distributes them. Raises CalibrationError.
    """
    captured.check_sites()
    _check_not_quantized(captured.network)
    network = _gradient_free_copy(captured.network)
    sites = [site for site in captured.sites if site.tied_to is None]
    weights = {site.path: weight for site in sites if (weight := weight_at(network, site.path)) is not None}
    sums = {
        site.path: MomentAccumulator(site.spec, weights[site.path].device) for site in sites if site.path in weights
    }
    _require_gradients(weights)
    collector = GradientCollector(sums, weights)
    random, reader = _SampleRandom(seed), BatchReader.of(batches)
    first, taken = peek_batches(iter_batches(network, reader, captured.example_inputs), READING_SAMPLES)
    known = resolve_likelihood(likelihood, network, samples_of_all_processes(first, READING_SAMPLES))
    del first
    for batch in _with_progress(taken, reader, progress):
        with torch.enable_grad():
            with collector:
                output = run_batch(network, batch)
            if isinstance(known, OutputLikelihood) and not random.samples:
                known = _without_detached(known, output, network)
            random.start_batch(known.count_samples(output, batch))
            pairs = known.draw(output, random.normal_like)
            _check_output(network, [tensor for tensor, _ in pairs])
            differentiable = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
            with collector.collecting_at(random.fractions):
                run_backward([pair[0] for pair in differentiable], [pair[1] for pair in differentiable])
        random.finish_batch()
        collector.reset()
    samples = torch.tensor([float(random.samples)], dtype=torch.float64, device="cpu")
    all_reduce([samples, *(tensor for found in sums.values() for tensor in found.tensors)])
    if samples == 1:
        warn_caller(
            f"{reader.name}: there is only one sample, and its statistics say little about other inputs. Pass a few "
            "hundred samples."
        )
    if not all(bool(tensor.isfinite().all()) for found in sums.values() for tensor in found.tensors):
        check_finite_state(network, "the model")
    return _statistics(sums, known, float(samples))


def _with_progress(
    batches: Iterator[ExampleInputs], reader: BatchReader, progress: Progress
) -> Iterable[ExampleInputs]:
    """Show the progress. How many batches a limit on samples allows is known once the first one is read."""
    first = next(batches)
    return with_progress(chain([first], batches), reader.count_batches(first), "calibrating", progress)


def _check_output(network: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Raise CalibrationError unless the tensors are finite and depend on a convolution's weight.

    Raises WeightError if they are not finite because of the network's own tensors.
    """
    if not all(bool(torch.isfinite(tensor.detach()).all()) for tensor in tensors):
        check_finite_state(network, "the model")
        raise CalibrationError(
            "calibration: the model's output, or its loss, is NaN or Inf on this data, although its weights are "
            "finite. Drop the samples that give NaN or Inf. If all do, convert a model in half precision with "
            ".float(), or mask with a large number instead of infinity."
        )
    if not any(tensor.requires_grad for tensor in tensors):
        _check_parameter_classes(network)
        raise CalibrationError(
            "calibration: no gradient flows from the output to a convolution or linear layer. If forward() detaches "
            "its output, or computes it from gradients of its own, plan without data (a Loss budget needs data, the "
            "others do not)."
        )


def _without_detached(likelihood: OutputLikelihood, output: Any, network: nn.Module) -> OutputLikelihood:
    """Leave out the outputs that no gradient flows from. Raises CalibrationError if none is left."""
    if not any(tensor.requires_grad for tensor in tensors_of(output)):
        _check_parameter_classes(network)
    return likelihood.without_detached(output)


def _check_parameter_classes(network: nn.Module) -> None:
    """Raise CalibrationError if the network has parameters of classes that may pass no gradients on."""
    for name, parameter in network.named_parameters():
        if is_wrapper(parameter):
            raise CalibrationError(
                "calibration: no gradient flows from the output to a convolution or linear layer, perhaps because "
                f"{name} is a {type(parameter).__name__}, whose operators pass none on, and which has no dequantize() "
                "of its own. Calibrate the network before it gets such parameters (fxfact.calibrate), and pass these "
                "statistics; or factorize it before."
            )


def _statistics(sums: Mapping[str, MomentAccumulator], likelihood: Likelihood, samples: float) -> Statistics:
    """Return the statistics from the sums over all samples."""
    for path, found in sums.items():
        if not all(bool(tensor.isfinite().all()) for tensor in found.tensors):
            raise CalibrationError(
                f"calibration: at {path} an input or a gradient is NaN or Inf, although the output is finite. A square "
                "root at zero does that. Drop the sample (a blank one?), or keep the root away from zero."
            )
    moments = {path: found.fisher(samples) for path, found in sums.items()}
    if moments and not any(moments.values()):
        raise CalibrationError(
            "calibration: the gradients of the output reach no convolution and no linear layer. Pass a likelihood that "
            "depends on them, or plan without data."
        )
    return Statistics(
        samples=int(samples),
        outputs=parts_of(likelihood),
        likelihood=None if parts_of(likelihood) else likelihood,
        specs={path: found.spec for path, found in sums.items() if moments[path] is not None},
        moments={path: fisher for path, fisher in moments.items() if fisher is not None},
    )


def generator_seed(seed: int, number: int) -> int:
    """Return the seed of the generator for one sample, from the caller's seed and the number of the sample.

    PyTorch's CPU generator only uses the low 32 bits of a seed, so both must reach them. The multiplier is 2³² divided
    by the golden ratio, made odd, which spreads consecutive seeds over all 32 bits (Knuth 1998, vol. 3, section 6.4).
    """
    return (number + seed * 0x9E3779B1) % 2**32


class _SampleRandom:
    """Random numbers for each sample, from its own generator, so that they do not depend on the batch it is in."""

    def __init__(self, seed: int) -> None:
        self._seed, self.samples = seed, 0
        self._rank, self._world_size = rank_and_world_size()
        self._generators: list[torch.Generator] = []
        self.fractions = torch.empty(0, device="cpu")  # (samples, positions): which patches of a sample to take

    def start_batch(self, count: int) -> None:
        """Create generators for the next ``count`` samples. Raises CalibrationError if there are none."""
        if not count:
            raise CalibrationError("calibration: the output of a batch has no samples. Drop such batches.")
        numbers = [(self.samples + k) * self._world_size + self._rank for k in range(count)]
        self._generators = [torch.Generator().manual_seed(generator_seed(self._seed, n)) for n in numbers]
        self.fractions = torch.stack([torch.rand(_POSITIONS, generator=own, **_CPU_FLOAT) for own in self._generators])

    def finish_batch(self) -> None:
        """Count the samples of the batch."""
        self.samples += len(self._generators)

    def normal_like(self, tensor: Tensor) -> Tensor:
        """Return standard normal numbers in the shape of ``tensor`` (samples, …)."""
        if len(tensor) != len(self._generators):
            raise CalibrationError(
                f"calibration: outputs have {len(tensor)} and {len(self._generators)} samples on their first axis. "
                "Return tensors with the samples on the first axis, or pass as likelihood a function of the output "
                "that returns a scalar loss."
            )
        rows = [torch.randn(tensor.shape[1:], generator=own, **_CPU_FLOAT) for own in self._generators]
        return torch.stack(rows).to(tensor.device)


def _check_not_quantized(network: nn.Module) -> None:
    """Raise CalibrationError if a graph quantizes activations, where gradients end or do not mean anything."""
    for node in network.graph.nodes if isinstance(network, fx.GraphModule) else ():
        name = node.target._schema.name if isinstance(node.target, OpOverload) else ""
        if "::quantize_" in name and isinstance(node.args[0], fx.Node) and node.args[0].op == "call_function":
            raise CalibrationError(
                f"calibration: the network quantizes activations ({node.name}: {name}), and no gradient leads through "
                "that. Calibrate the network before it is quantized (fxfact.calibrate), and pass these statistics; or "
                "plan without data."
            )


def _gradient_free_copy(network: nn.Module) -> nn.Module:
    """Return a private copy in evaluation mode in which no tensor requires gradients, and none is quantized."""
    return dequantize_parameters(to_eval(alias_copy(network))).requires_grad_(requires_grad=False)


def _require_gradients(weights: Mapping[str, Tensor]) -> None:
    """Let the weights of a private copy, buffers too, require gradients.

    Weights that share memory are separated, because the collector recognizes a weight by its memory.
    """
    held = StorageIndex()
    for path, weight in weights.items():
        if held.name_of(weight) is not None:
            weight.data = weight.detach().clone()
        held.add(path, weight)
        weight.requires_grad_(weight.is_floating_point())
