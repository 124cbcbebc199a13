"""``torch.compile(model, backend="fxfact")``: convolutions factorized in the graphs that Dynamo captures.

Parameters are inputs of such a graph. For planning, the convolutions' become attributes again; what is handed on to the
next compiler takes the factors as further inputs, which a look-up at every call keeps equal to what the parameters are
by then. For inference: a convolution whose weight is being trained stays dense, so that the weight gets its gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from fxfact.capture import Captured, samples_of
from fxfact.conv import ConvLayer, ConvSite, Skip, from_torch, write_chain
from fxfact.errors import ArgumentTypeError
from fxfact.factorizations import RankSpec
from fxfact.graph import GraphSite, lift, lower, match
from fxfact.passes import DecomposeOptions, FactorizeConvs, decompose
from fxfact.planning import Decision, FactorizationRequest, FixedRanks, Plan, RankRule, Selection, build_plan

_log = logging.getLogger(__name__)
_Compiled = Callable[..., Any]
_OWN = ("factorization", "rank", "multiple_of", "include", "exclude", "allow_growth", "inner")
_TRAINED = "gradients are on and its weight is being trained; call the compiled model under torch.no_grad()"


class backend:  # noqa: N801 (it is called as a function is)
    """A backend for ``torch.compile(model, backend=fxfact.backend("tucker", rank=0.5))``.

    The arguments are those of ``fxfact.plan``, paths those of the model's modules, of which a graph may have some
    only: what fits none is no error here. ``inner`` is the backend, by name or itself, that compiles what comes out.
    ``plans`` has the plan of every graph so far.
    Factors follow their parameters: written to, replaced, loaded, converted; only writes through ``parameter.data``
    go unseen. The model keeps its parameters, and so its size. Raises ArgumentError, RankError.
    """

    def __init__(
        self,
        factorization: FactorizationRequest | Mapping[str, FactorizationRequest] = "tucker",
        *,
        rank: RankSpec | RankRule | Mapping[str, RankSpec | RankRule] = 0.5,
        multiple_of: int | None = None,
        include: Selection | None = None,
        exclude: Selection | None = None,
        allow_growth: bool = False,
        inner: str | _Compiled = "inductor",
    ) -> None:
        self._strategy = replace(FixedRanks.parse(factorization, rank, multiple_of), partial=True)
        self._selection: dict[str, Any] = {
            "include": include, "exclude": exclude, "allow_growth": allow_growth,
            "partial": True,  # Dynamo may split a model into several graphs
        }  # fmt: skip
        if not isinstance(inner, str) and not callable(inner):
            raise ArgumentTypeError(f"inner must be a backend or the name of one, got {inner!r}. Pass 'inductor'.")
        self._inner = inner
        self.plans: list[Plan] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> _Compiled:
        """What Dynamo calls. ``options`` are for the inner backend."""
        lifted = lift(graph_module, example_inputs)
        captured = _captured(lifted.graph_module)
        plan = build_plan(captured, self._strategy, **self._selection)
        self.plans.append(plan)
        _log.info("a graph of %d nodes:\n%s", len(graph_module.graph.nodes), plan)
        if not plan.rewrites:
            return _compiled(self._inner, graph_module, list(example_inputs), options)
        sites = {site.path: site for site in captured.sites if isinstance(site, GraphSite)}
        result = FactorizeConvs(plan, decomposing=DecomposeOptions(weights="empty"))(lifted.graph_module)
        assert result is not None
        lowered, factors = lower(lifted, result.graph_module, [sites[d.path] for d in plan.rewrites])
        lowered.meta = {key: value for key, value in graph_module.meta.items() if key != "dynamo_compile_id"}
        wanted = [(lifted.places[sites[f.path].attributes[0]], plan[f.path], f.stage) for f in factors]

        def with_factors(inputs: Sequence[Any]) -> list[Any]:
            return [*inputs, *(_factors_of(inputs[place], decision)[stage] for place, decision, stage in wanted)]

        faked = _faked(with_factors(example_inputs), like=example_inputs)
        compiled = _compiled(self._inner, lowered, faked, options)

        def run(*inputs: Any) -> Any:
            return compiled(*with_factors(inputs))

        return run


def _faked(inputs: Sequence[Any], *, like: Sequence[Any]) -> list[Any]:
    """Inputs for a compiler: behind those that Dynamo gave others, whose sizes it cannot guard, and so fixed."""
    from torch._guards import detect_fake_mode  # noqa: PLC0415 (with the compiler)

    mode = detect_fake_mode(list(like))
    own = inputs[len(like) :]
    return [*inputs[: len(like)], *(own if mode is None else (mode.from_tensor(t, static_shapes=True) for t in own))]


def by_name(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **keywords: Any) -> _Compiled:
    """The backend called "fxfact": options are the arguments of ``backend``; the others go to the inner one."""
    options = dict(keywords.pop("options", None) or {})
    own = {name: options.pop(name) for name in _OWN if name in options}
    rest = {**keywords, "options": options} if options else keywords
    return backend(**own)(graph_module, example_inputs, **rest)


_known: Any = WeakTensorKeyDictionary()  # by weight, then by decision: the weight's state, and the factors of it then


def _factors_of(weight: Tensor, decision: Decision) -> list[Tensor]:
    """The weights of the stages, in PyTorch's layout; made again when the weight was changed, and kept as it lives."""
    state = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
    known: dict[str, tuple[Any, list[Tensor]]] = _known.setdefault(weight, {})
    key = f"{decision.factorization} {decision.rank} {decision.spec}"
    if key not in known or known[key][0] != state:
        known[key] = state, _decomposed(weight, decision)
    return known[key][1]


@torch.inference_mode(False)
@torch.no_grad()
def _decomposed(weight: Tensor, decision: Decision) -> list[Tensor]:
    assert decision.spec is not None
    layer = ConvLayer(replace(decision.spec, bias=False), from_torch(decision.spec, weight.detach()), None)
    weights, _ = decompose(layer, decision, None, None)
    stages = write_chain(decision.stages, weights, None, like=weight)
    return [stage.weight.detach() for stage in stages if isinstance(stage.weight, Tensor)]


def _captured(graph_module: fx.GraphModule) -> Captured:
    """For planning; a convolution whose weight is being trained, or is one that does not count its changes, is none."""
    found = [_inferred(item) if isinstance(item, ConvSite) else item for item in match(graph_module).found]
    trained = [item.subject for item in found if isinstance(item, Skip) and item.reason == _TRAINED]
    if trained:
        _log.warning("%d convolutions stay dense: %s", len(trained), _TRAINED)
    sites = [item for item in found if isinstance(item, ConvSite)]
    shapes = [torch.empty(shape, device="meta") for site in sites for shape in site.input_shapes or ()]
    return Captured(
        frontend="trace",
        model="a graph of torch.compile's",
        network=graph_module,
        found=tuple(found),
        macs=None,
        samples=samples_of(shapes, sites),
    )


def _inferred(site: ConvSite) -> ConvSite | Skip:
    if site.weight.is_inference():
        return Skip("its weight was made in inference mode and does not count its changes", site.path)
    trained = torch.is_grad_enabled() and site.weight.requires_grad
    return Skip(_TRAINED, site.path) if trained else site


def _compiled(inner: str | _Compiled, graph_module: fx.GraphModule, inputs: list[Any], options: Any) -> _Compiled:
    # PyTorch's compilers take seconds to import, so only who compiles imports them.
    from torch._dynamo.backends.registry import lookup_backend  # noqa: PLC0415
    from torch._inductor import list_mode_options  # noqa: PLC0415

    if inner == "inductor":
        mode = options.get("mode")
        patches = {**(list_mode_options(mode) if mode else {}), **(options.get("options") or {})}
        options = {"config_patches": patches or None}
    compiler: _Compiled = lookup_backend(inner) if isinstance(inner, str) else inner
    return cast(_Compiled, compiler(graph_module, inputs, **options))
