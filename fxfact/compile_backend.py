"""``torch.compile(model, backend="fxfact")``: factorizes convolutions in the graphs that Dynamo captures.

Dynamo makes parameters inputs of the graph. To plan and rewrite the graph, the parameters of convolutions become
attributes again. The next compiler gets the factors as additional inputs. At every call, the factors are looked up in a
cache, and decomposed again if their parameter has changed.

The backend is for inference. A convolution whose weight is being trained stays dense, so that the weight gets its
gradient.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from fxfact.capture import Captured, samples_of
from fxfact.conv import ConvLayer, ConvSite, Skip, from_torch, write_chain
from fxfact.errors import ArgumentError, ArgumentTypeError
from fxfact.factorizations import RankSpec
from fxfact.graph import GraphSite, lift, lower, match
from fxfact.passes import DecomposeOptions, FactorizeConvs, decompose_layer
from fxfact.planning import (
    KINDS,
    Decision,
    FactorizationRequest,
    FixedRanks,
    Kinds,
    Plan,
    RankRule,
    SearchScope,
    Selection,
    build_plan,
    warn_without_data,
)

_log = logging.getLogger(__name__)
_Compiled = Callable[..., Any]
_BACKEND_OPTIONS = ("factorization", "rank", "multiple_of", "include", "exclude", "kinds", "allow_growth", "inner")
_NEAR = 0.75  # similarity of two names, from which on one may be the other one misspelt
_WITH_DATA = "Compile fxfact.factorize(model, budget=fxfact.Macs(0.5), calibration=batches) instead."
_IS_TRAINED = "gradients are on and its weight is being trained; call the compiled model under torch.no_grad()"


class backend:  # noqa: N801 (it is called like a function)
    """A backend for ``torch.compile(model, backend=fxfact.backend("tucker", rank=0.5))``.

    The factors follow the model's parameters: if a parameter is written to, replaced, loaded or converted, it is
    decomposed again at the next call. Only in-place writes to ``parameter.data`` are not noticed. The model keeps its
    dense parameters, so it does not become smaller. Ranks are chosen without data: where accuracy matters, compile what
    ``fxfact.factorize`` returns.

    Args:
        factorization: As for ``fxfact.plan``. Paths are those of the model's modules. If Dynamo splits the model into
            several graphs, a path may be missing from a graph; that is no error.
        rank: As for ``fxfact.plan``. The default keeps half of the parameters of every convolution.
        multiple_of: As for ``fxfact.plan``.
        include: As for ``fxfact.plan``.
        exclude: As for ``fxfact.plan``.
        kinds: As for ``fxfact.plan``.
        allow_growth: As for ``fxfact.plan``.
        inner: The backend, or its name, that compiles the factorized graph.

    Attributes:
        plans: The plan of every graph that was compiled so far.

    Raises:
        ArgumentError: An option has a value that cannot be used.
        ArgumentTypeError: An option has a type that cannot be used.
        RankError: ``rank`` is not a rank.
    """

    def __init__(
        self,
        factorization: FactorizationRequest | Mapping[str, FactorizationRequest] = "tucker",
        *,
        rank: RankSpec | RankRule | Mapping[str, RankSpec | RankRule] = 0.5,
        multiple_of: int | None = None,
        include: Selection | None = None,
        exclude: Selection | None = None,
        kinds: Kinds = KINDS,
        allow_growth: bool = False,
        inner: str | _Compiled = "inductor",
    ) -> None:
        self._strategy = replace(FixedRanks.parse(factorization, rank, multiple_of), partial=True)
        # Dynamo may split a model into several graphs, so a glob may fit none of the layers of one graph.
        self._scope = SearchScope(
            include=include, exclude=exclude, kinds=kinds, allow_growth=allow_growth, partial=True
        )
        if not isinstance(inner, str) and not callable(inner):
            raise ArgumentTypeError(
                f"inner must be a backend or its name, got {inner!r}. Pass 'inductor', for example."
            )
        self._inner = inner
        self.plans: list[Plan] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> _Compiled:
        """Factorize and compile one graph that Dynamo captured.

        Args:
            graph_module: The graph, with parameters as inputs.
            example_inputs: Values of all inputs.
            options: Keyword arguments for the inner backend.

        Returns:
            A function of the graph's inputs.

        Raises:
            ArgumentError: An option is unknown to the inner backend, or there is no such backend or mode.
        """
        compile_inner, options = _compiler_of(self._inner), _checked_options(self._inner, options)
        lifted = lift(graph_module, example_inputs)
        captured = _capture_graph(lifted.graph_module)
        plan = build_plan(captured, self._strategy, self._scope)
        self.plans.append(plan)
        warn_without_data(plan, "fxfact.backend", _WITH_DATA)
        _log.info("a graph of %d nodes:\n%s", len(graph_module.graph.nodes), plan)
        if not plan.rewrites:
            return cast(_Compiled, compile_inner(graph_module, list(example_inputs), **options))
        sites = {site.path: site for site in captured.sites if isinstance(site, GraphSite)}
        result = FactorizeConvs(plan, options=DecomposeOptions(weights="empty"))(lifted.graph_module)
        assert result is not None
        lowered, factors = lower(lifted, result.graph_module, [sites[d.path] for d in plan.rewrites])
        lowered.meta = {key: value for key, value in graph_module.meta.items() if key != "dynamo_compile_id"}
        factor_inputs = [(lifted.input_index[sites[f.path].attributes[0]], plan[f.path], f.stage) for f in factors]

        def with_factors(inputs: Sequence[Any]) -> list[Any]:
            values = (_factors_of(inputs[index], decision)[stage] for index, decision, stage in factor_inputs)
            return [*inputs, *values]

        inner_inputs = _with_fake_factors(with_factors(example_inputs), graph_inputs=example_inputs)
        compiled = compile_inner(lowered, inner_inputs, **options)

        def run(*inputs: Any) -> Any:
            return compiled(*with_factors(inputs))

        return run


def _with_fake_factors(inputs: Sequence[Any], *, graph_inputs: Sequence[Any]) -> list[Any]:
    """Make the factors after the graph's own inputs fake. Their sizes are static, because Dynamo cannot guard them."""
    from torch._guards import detect_fake_mode  # noqa: PLC0415 (slow to import)

    fake_mode = detect_fake_mode(list(graph_inputs))
    if fake_mode is None:
        return list(inputs)
    factors = inputs[len(graph_inputs) :]
    return [*inputs[: len(graph_inputs)], *(fake_mode.from_tensor(each, static_shapes=True) for each in factors)]


def by_name(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **keywords: Any) -> _Compiled:
    """Compile a graph for ``torch.compile(model, backend="fxfact", options=...)``.

    Options that are arguments of ``backend`` go there. The others go to the inner backend. Raises ArgumentError for an
    option that neither has.
    """
    options = dict(keywords.pop("options", None) or {})
    arguments = {name: options.pop(name) for name in _BACKEND_OPTIONS if name in options}
    inner_keywords = {**keywords, "options": options} if options else keywords
    return backend(**arguments)(graph_module, example_inputs, **inner_keywords)


# For every weight that is alive, and every factorization of it: the state that the weight had, and its factors.
_factor_cache: Any = WeakTensorKeyDictionary()


def _factors_of(weight: Tensor, decision: Decision) -> list[Tensor]:
    """Return the weights of the stages, in PyTorch's layout, from the cache unless the weight has changed."""
    state = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
    cached: dict[str, tuple[Any, list[Tensor]]] = _factor_cache.setdefault(weight, {})
    key = f"{decision.factorization} {decision.rank} {decision.spec}"
    if key not in cached or cached[key][0] != state:
        cached[key] = state, _decompose(weight, decision)
    return cached[key][1]


@torch.inference_mode(False)
@torch.no_grad()
def _decompose(weight: Tensor, decision: Decision) -> list[Tensor]:
    assert decision.spec is not None
    layer = ConvLayer(replace(decision.spec, bias=False), from_torch(decision.spec, weight.detach()), None)
    weights = decompose_layer(layer, decision, None, None).weights
    stages = write_chain(decision.stages, weights, None, like=weight)
    return [stage.weight.detach() for stage in stages if isinstance(stage.weight, Tensor)]


def _capture_graph(graph_module: fx.GraphModule) -> Captured:
    """List the graph's convolutions, and warn of those that stay dense because their weight is being trained."""
    found = [_skip_unless_frozen(item) if isinstance(item, ConvSite) else item for item in match(graph_module).found]
    trained = [item for item in found if isinstance(item, Skip) and item.reason == _IS_TRAINED]
    if trained:
        _log.warning("%d convolutions stay dense: %s", len(trained), _IS_TRAINED)
    sites = [item for item in found if isinstance(item, ConvSite)]
    shapes = [torch.empty(shape, device="meta") for site in sites for shape in site.input_shapes or ()]
    return Captured(
        frontend="trace",
        model="a graph of torch.compile",
        network=graph_module,
        found=tuple(found),
        macs=None,
        samples=samples_of(shapes, sites),
    )


def _skip_unless_frozen(site: ConvSite) -> ConvSite | Skip:
    if site.weight.is_inference():
        return Skip("its weight was made in inference mode and does not count its changes", site.path)
    is_trained = torch.is_grad_enabled() and site.weight.requires_grad
    return Skip(_IS_TRAINED, site.path) if is_trained else site


def _checked_options(inner: str | _Compiled, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for the inner backend.

    Those for inductor become its config patches. Raises ArgumentError for a mode or an option that it does not have.
    For other backends only an option is refused that looks like a misspelt one of fxfact.
    """
    options = keywords.get("options") or {}
    if inner != "inductor":
        for name in options:
            if near := difflib.get_close_matches(str(name), _BACKEND_OPTIONS, n=1, cutoff=_NEAR):
                raise ArgumentError(_unknown_option(name, near[0]))
        return dict(keywords)
    # PyTorch's compilers take seconds to import, so they are imported when they are used.
    from torch._inductor import config, list_mode_options, list_options  # noqa: PLC0415

    modes, mode = list_mode_options(), keywords.get("mode")
    if mode and mode not in modes:
        near = difflib.get_close_matches(str(mode), modes, n=1) or [next(iter(modes))]
        raise ArgumentError(
            f"inductor has no mode {mode!r}. Did you mean {near[0]!r}? Its modes are {', '.join(modes)}."
        )
    spelled = {str(name).replace("-", "_"): (name, value) for name, value in options.items()}
    for spelling, (name, _) in spelled.items():
        if not hasattr(config, spelling):
            near = difflib.get_close_matches(spelling, [*_BACKEND_OPTIONS, *list_options()], n=1)
            raise ArgumentError(_unknown_option(name, near[0] if near else None))
    patches = {**(modes[mode] if mode else {}), **{name: value for name, (_, value) in spelled.items()}}
    return {"config_patches": patches or None}


def _unknown_option(name: object, near: str | None) -> str:
    """Return the message for an option that neither fxfact nor the inner backend has."""
    own = ", ".join(_BACKEND_OPTIONS)
    if name in _BACKEND_OPTIONS:
        return f"{name!r} is an argument of fxfact.backend, and not of torch.compile. Pass fxfact.backend({name}=...)."
    if name == "mode":
        return "'mode' is no option. Pass torch.compile(model, backend=fxfact.backend(...), mode=...)."
    hint = f" Did you mean {near!r}?" if near else ""
    return (
        f"there is no option {name!r}.{hint} The options of fxfact are {own}. Others go to the inner backend; "
        "torch._inductor.list_options() lists those of inductor."
    )


def _compiler_of(inner: str | _Compiled) -> _Compiled:
    """Return the inner backend. Raises ArgumentError if there is none of this name."""
    if not isinstance(inner, str):
        return inner
    from torch._dynamo.backends.registry import list_backends, lookup_backend  # noqa: PLC0415
    from torch._dynamo.exc import InvalidBackend  # noqa: PLC0415

    try:
        found: _Compiled = lookup_backend(inner)
    except InvalidBackend as error:
        near = difflib.get_close_matches(inner, list_backends(exclude_tags=()), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        names = ", ".join(list_backends())
        raise ArgumentError(f"inner: there is no backend {inner!r}.{hint} There are {names}.") from error
    return found
