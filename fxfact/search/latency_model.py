"""How long convolutions, and the chains that could replace them, take in one network: measured on this machine."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from fxfact.conv import CHANNELS_LAST, ConvSite, ConvSpec, Sizes, write_conv
from fxfact.passes import INFERENCE_PASSES, MODULE_PASSES, ChannelsLast, linear_passes
from fxfact.planning import Layout
from fxfact.search.inference import FastestPasses
from fxfact.search.latency_cache import LatencyCache, describe_machine
from fxfact.search.packed_convs import pack_chain
from fxfact.utils import Timer, seeded_randn, summarize_turns

_REPEATS = 31  # turns of a layer and its chains
_MAX_SECONDS = 6.0  # for these turns; there are fewer if they would take longer
_MAX_SPREAD = 1.5  # the median over the minimum of a layer's times; above it the machine is under load


class MeasuredLatencyModel:
    """Measures layers and chains on the input shapes, dtype, device and memory format that they have in a network.

    A layer and its chains take turns. On a CPU each runs once in a turn, so that its weights have left the caches when
    they are needed again, as in the network. Results are kept in a ``LatencyCache``. Of a layer whose times are known,
    only the dense convolution is measured again. If that takes much less than before, the machine was under load then,
    and its chains are measured again too. Otherwise cached times are rescaled to the machine's current speed.

    Args:
        sites: the convolutions of the network.
        fastest: the exact passes that make the dense network fastest, and its milliseconds.
        compiled: measure as the network runs under ``torch.compile`` with frozen weights.
        timer: measures the calls.
    """

    def __init__(self, sites: Sequence[ConvSite], fastest: FastestPasses, *, compiled: bool, timer: Timer) -> None:
        self.network_ms, self.passes = fastest.ms, fastest.passes
        self._compiled, self._timer = compiled, timer
        self._sites: Mapping[str, list[ConvSite]] = {
            site.path: [other for other in sites if site.path in (other.path, other.tied_to)] for site in sites
        }
        device = sites[0].weight.device if sites else torch.device("cpu")
        self._cache = LatencyCache(describe_machine(device))
        self._spreads: list[float] = []
        self._speed: dict[str, float] = {}  # by layer: the factor from cached times to current ones
        if fastest.linear_undecided and self._is_linear_faster(sites):
            self.passes = _with_linear_passes(self.passes, sites)

    @property
    def is_noisy(self) -> bool:
        """Whether the machine was under such load that the times of most layers spread by half or more."""
        return bool(self._spreads) and median(self._spreads) > _MAX_SPREAD

    def latencies_ms(self, path: str, layouts: Sequence[Layout]) -> list[float]:
        """See ``fxfact.planning.LatencyModel``."""
        layer, keys = self._layer_key(path, self.passes), [self._layout_key(path, layout) for layout in layouts]
        known = self._cache.times_of(layer)
        asked = sorted({0, *(k for k, key in enumerate(keys) if key not in known)})
        if len(asked) > 1 or layer not in self._speed:
            measured = self._measure(path, [(layouts[k], self.passes) for k in asked])
            if known and known.get(keys[0], math.inf) > _MAX_SPREAD * measured[0]:
                known.clear()
                return self.latencies_ms(path, layouts)
            _merge_times(known, {keys[k]: ms for k, ms in zip(asked, measured, strict=True)}, keys[0])
            self._speed[layer] = measured[0] / known[keys[0]]
        return [known[key] * self._speed[layer] for key in keys]

    def forget(self) -> None:
        """Forget all times, so that all layers and chains are measured again."""
        self._cache.clear()
        self._spreads.clear()
        self._speed.clear()

    def save(self) -> None:
        """Write the cache to its file, unless the machine was under load."""
        if self._spreads and not self.is_noisy:
            self._cache.save()

    def _is_linear_faster(self, sites: Sequence[ConvSite]) -> bool:
        """Return whether matrix products are faster for 1×1 convolutions.

        Those measured are on the inputs of these layers, to half as many channels.
        """
        saved, variants = 0.0, (self.passes, _with_linear_passes(self.passes, sites))
        keys = [_hash(self._module_passes(passes)) for passes in variants]
        for site in sites:
            if site.spec.in_channels > 1 and site.spec.order and site.tied_to is None:
                known = self._cache.times_of(self._layer_key(site.path, *variants))
                if not known.keys() >= set(keys):
                    times = self._measure(site.path, [(_pointwise_to_half, passes) for passes in variants])
                    known.update(zip(keys, times, strict=True))
                saved += known[keys[0]] - known[keys[1]]
        return saved > 0

    def _measure(self, path: str, variants: Sequence[tuple[Layout, Sequence[str]]]) -> list[float]:
        """Return the milliseconds of layouts after passes."""
        weight = self._sites[path][0].weight
        inputs = {shape: self._input_like(seeded_randn(shape).to(weight), spec) for spec, shape in self._calls(path)}
        calls = [partial(_run_calls, self._runnable(path, *variant, inputs)) for variant in variants]
        if self._compiled and weight.device.type == "cuda":
            turns = self._timer.graph_turns(calls, weight.device, repeats=_REPEATS, within=_MAX_SECONDS)
        else:
            on_cpu = weight.device.type == "cpu"  # on other devices a single run would measure the launch
            number, warm = (1, 0) if on_cpu else (None, 1)
            turns = self._timer.turns(calls, repeats=_REPEATS, number=number, warm=warm, within=_MAX_SECONDS)
        self._spreads.append(median(turns[0]) / min(turns[0]))
        return summarize_turns(turns)

    def _runnable(
        self, path: str, layout: Layout, passes: Sequence[str], inputs: Mapping[Sizes, Tensor]
    ) -> list[tuple[nn.Module, Tensor]]:
        """Return the module and the input of every call."""
        calls, like = self._calls(path), self._sites[path][0].weight
        chains = {spec: self._chain(layout(spec), like, passes) for spec, _ in calls}
        modules = {
            (spec, shape): pack_chain(chains[spec], inputs[shape]) if self._compiled else chains[spec]
            for spec, shape in calls
        }
        return [(modules[call], inputs[call[1]]) for call in calls]

    def _chain(self, specs: Sequence[ConvSpec], like: Tensor, passes: Sequence[str]) -> nn.Sequential:
        """Return stages that hold random weights."""
        stages: list[nn.Module] = []
        for spec in specs:
            weight = seeded_randn(spec.weight_shape) / max(1, spec.weight_shape[1]) ** 0.5
            stages += write_conv(spec, weight.to(like), like.new_zeros(spec.out_channels) if spec.bias else None)
        chain = nn.Sequential(*stages).eval().requires_grad_(requires_grad=False)
        for name in self._module_passes(passes):
            INFERENCE_PASSES[name]().change(chain)
        return chain

    def _module_passes(self, passes: Sequence[str]) -> list[str]:
        """Return the passes that concern single convolutions. Compilers choose channels_last themselves."""
        return [name for name in MODULE_PASSES if name in passes or (name == ChannelsLast.name and self._compiled)]

    def _input_like(self, tensor: Tensor, spec: ConvSpec) -> Tensor:
        """Return an input in the memory format that it has after the passes. Without a batch axis it is contiguous."""
        batched = tensor.ndim == spec.order + 2
        formats = CHANNELS_LAST if batched and ChannelsLast.name in self._module_passes(self.passes) else {}
        return tensor.contiguous(memory_format=formats.get(tensor.ndim, torch.contiguous_format))

    def _calls(self, path: str) -> list[tuple[ConvSpec, Sizes]]:
        """Return the spec and the input shape of every call of the layer and of those that share its weight."""
        return [(site.spec, shape) for site in self._sites[path] for shape in site.input_shapes or ()]

    def _layout_key(self, path: str, layout: Layout) -> str:
        return _hash([[asdict(stage) for stage in layout(site.spec)] for site in self._sites[path]])

    def _layer_key(self, path: str, *variants: Sequence[str]) -> str:
        """Return the cache key of a layer after some passes."""
        how = [str(self._sites[path][0].weight.dtype), *map(self._module_passes, variants), self._compiled]
        return _hash([*how, [(asdict(spec), shape) for spec, shape in self._calls(path)]])


def _with_linear_passes(passes: Sequence[str], sites: Sequence[ConvSite]) -> tuple[str, ...]:
    """Return the passes with those for matrix products, in the order in which they must run."""
    wanted = {*passes, *linear_passes(site.spec for site in sites)}
    return (*(name for name in passes if name not in MODULE_PASSES), *(n for n in MODULE_PASSES if n in wanted))


def _pointwise_to_half(spec: ConvSpec) -> tuple[ConvSpec, ...]:
    return (ConvSpec.parse(spec.in_channels, spec.in_channels // 2, (1,) * spec.order),)


def _run_calls(calls: Sequence[tuple[nn.Module, Tensor]]) -> None:
    for chain, x in calls:
        chain(x)


def _merge_times(known: dict[str, float], measured: Mapping[str, float], dense: str) -> None:
    """Add measured times to the known ones, all rescaled to the faster speed of both, by the dense layer's time."""
    before, now = known.get(dense, measured[dense]), measured[dense]
    best = min(before, now)
    known.update({key: ms * best / before for key, ms in known.items()})
    known.update({key: ms * best / now for key, ms in measured.items()})


def _hash(described: object) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:24]
