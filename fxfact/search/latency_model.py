"""The milliseconds of convolutions and of the chains that could replace them, as they are in one network."""

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

from fxfact.conv import CHANNELS_LAST, FORMS, ConvSite, ConvSpec, Sizes, linear_form, write_conv
from fxfact.planning import Layout
from fxfact.search.latency_cache import LatencyCache, describe_machine
from fxfact.search.packed_convs import pack_chain
from fxfact.utils import compared, milliseconds, milliseconds_of_graphs, random_numbers

_REPEATS, _WITHIN = 31, 6.0  # turns of a convolution and its chains, fewer where they would take more seconds
_SPREAD = 1.5


def _as_linear(form: Sequence[str], sites: Sequence[ConvSite]) -> tuple[str, ...]:
    """With matrix products besides, in the order in which what a convolution is computed by is chosen."""
    wanted = {*form, *linear_form(site.spec for site in sites)}
    return (*(name for name in form if name not in FORMS), *(name for name in FORMS if name in wanted))


class MeasuredLatency:
    """Measures layouts of stages on the input shapes of a network's convolutions, in the dtype, on the device and in
    the memory format in which it runs, all of a convolution taking turns. On a processor each runs once in a turn: so
    its weights have left the caches when they are wanted again, as in the network.

    Of what is kept only the convolution itself is measured again: where it takes much less, the machine was under load
    before, and its chains are measured again too. Else all count at its pace of now, at which the network runs as well.

    ``network`` is the milliseconds of the whole dense network in its fastest form: after the passes ``form``, and
    ``compiled`` with frozen weights. ``undecided`` says that 1×1 convolutions may be matrix products besides: then
    ``form`` becomes whichever measures faster.
    """

    def __init__(
        self, sites: Sequence[ConvSite], network: float, *, form: Sequence[str], undecided: bool, compiled: bool
    ) -> None:
        self.network, self.form, self._compiled = network, tuple(form), compiled
        self._sites: Mapping[str, list[ConvSite]] = {
            site.path: [other for other in sites if site.path in (other.path, other.tied_to)] for site in sites
        }
        device = sites[0].weight.device if sites else torch.device("cpu")
        self._kept = LatencyCache(describe_machine(device))
        self._spreads: list[float] = []
        self._pace: dict[str, float] = {}  # of this machine now, for what is kept: how many times as long all takes
        if undecided and self._faster_if_linear(sites):
            self.form = _as_linear(self.form, sites)

    @property
    def noisy(self) -> bool:
        """Whether the machine was under such load that most measurements spread by half and more."""
        return bool(self._spreads) and median(self._spreads) > _SPREAD

    def times(self, path: str, layouts: Sequence[Layout]) -> list[float]:
        """Milliseconds of each, at all calls of the convolution and those that share its weight, the first layout being
        the convolution itself.
        """
        group, keys = self._group(path, self.form), [self._key(path, layout) for layout in layouts]
        known = self._kept.ms.setdefault(group, {})
        asked = sorted({0, *(k for k, key in enumerate(keys) if key not in known)})
        if len(asked) > 1 or group not in self._pace:
            measured = self._measured(path, [(layouts[k], self.form) for k in asked])
            if known and known.get(keys[0], math.inf) > _SPREAD * measured[0]:
                known.clear()
                return self.times(path, layouts)
            _add(known, {keys[k]: ms for k, ms in zip(asked, measured, strict=True)}, keys[0])
            self._pace[group] = measured[0] / known[keys[0]]
        return [known[key] * self._pace[group] for key in keys]

    def save(self) -> None:
        """Keep what was measured, for the next time."""
        if self._spreads and not self.noisy:
            self._kept.save()

    def _faster_if_linear(self, sites: Sequence[ConvSite]) -> bool:
        """Whether 1×1 convolutions on the inputs of these, to half as many channels, take less time so."""
        saved, forms = 0.0, (self.form, _as_linear(self.form, sites))
        keys = [_hash(self._of_modules(form)) for form in forms]
        for site in sites:
            if site.spec.in_channels > 1 and site.tied_to is None:
                known = self._kept.ms.setdefault(self._group(site.path, *forms), {})
                if not known.keys() >= set(keys):
                    known.update(
                        zip(keys, self._measured(site.path, [(_halving, form) for form in forms]), strict=True)
                    )
                saved += known[keys[0]] - known[keys[1]]
        return saved > 0

    def _measured(self, path: str, layouts: Sequence[tuple[Layout, Sequence[str]]]) -> list[float]:
        """Of layouts in forms."""
        weight = self._sites[path][0].weight
        inputs = {shape: self._formatted(random_numbers(shape).to(weight)) for _, shape in self._calls(path)}
        calls = [partial(_run, self._ready(path, *each, inputs)) for each in layouts]
        if self._compiled and weight.device.type == "cuda":
            turns = milliseconds_of_graphs(calls, weight.device, repeats=_REPEATS, within=_WITHIN)
        else:
            on_cpu = weight.device.type == "cpu"  # else the launch and the wait for it are measured
            number, warm = (1, 0) if on_cpu else (None, 1)
            turns = milliseconds(calls, repeats=_REPEATS, number=number, warm=warm, within=_WITHIN)
        self._spreads.append(median(turns[0]) / min(turns[0]))
        return compared(turns)

    def _ready(
        self, path: str, layout: Layout, form: Sequence[str], inputs: Mapping[Sizes, Tensor]
    ) -> list[tuple[nn.Module, Tensor]]:
        """What runs at every call, and on what."""
        calls, like = self._calls(path), self._sites[path][0].weight
        chains = {spec: self._chain(layout(spec), like, form) for spec, _ in calls}
        ready = {
            (spec, shape): pack_chain(chains[spec], inputs[shape]) if self._compiled else chains[spec]
            for spec, shape in calls
        }
        return [(ready[call], inputs[call[1]]) for call in calls]

    def _chain(self, specs: Sequence[ConvSpec], like: Tensor, form: Sequence[str]) -> nn.Sequential:
        """Stages that hold random numbers."""
        stages: list[nn.Module] = []
        for spec in specs:
            weight = random_numbers(spec.weight_shape) / max(1, spec.weight_shape[1]) ** 0.5
            stages += write_conv(spec, weight.to(like), like.new_zeros(spec.out_channels) if spec.bias else None)
        chain = nn.Sequential(*stages).eval().requires_grad_(requires_grad=False)
        for name in self._of_modules(form):
            FORMS[name](chain)
        return chain

    def _of_modules(self, form: Sequence[str]) -> list[str]:
        """What of a form is about single convolutions; the compiler chooses channels_last itself."""
        return [name for name in FORMS if name in form or (name == "channels_last" and self._compiled)]

    def _formatted(self, tensor: Tensor) -> Tensor:
        formats = CHANNELS_LAST if "channels_last" in self._of_modules(self.form) else {}
        return tensor.contiguous(memory_format=formats.get(tensor.ndim, torch.contiguous_format))

    def _calls(self, path: str) -> list[tuple[ConvSpec, Sizes]]:
        """Of the convolution and those that share its weight: what is computed on an input of which shape."""
        return [(site.spec, shape) for site in self._sites[path] for shape in site.input_shapes or ()]

    def _key(self, path: str, layout: Layout) -> str:
        """A name for what a layout makes of them."""
        return _hash([[asdict(stage) for stage in layout(site.spec)] for site in self._sites[path]])

    def _group(self, path: str, *forms: Sequence[str]) -> str:
        """A name for a convolution, computed in some forms."""
        site = self._sites[path][0]
        how = [str(site.weight.dtype), *map(self._of_modules, forms), self._compiled]
        return _hash([*how, [(asdict(spec), shape) for spec, shape in self._calls(path)]])


def _halving(spec: ConvSpec) -> tuple[ConvSpec, ...]:
    return (ConvSpec.parse(spec.in_channels, spec.in_channels // 2, (1,) * spec.order),)


def _run(calls: Sequence[tuple[nn.Module, Tensor]]) -> None:
    for chain, x in calls:
        chain(x)


def _add(known: dict[str, float], found: Mapping[str, float], dense: str) -> None:
    """New times to those known, all at the faster pace of both, by the convolution's own."""
    before, now = known.get(dense, found[dense]), found[dense]
    best = min(before, now)
    known.update({key: ms * best / before for key, ms in known.items()})
    known.update({key: ms * best / now for key, ms in found.items()})


def _hash(described: object) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:24]
