"""Linear layers in a graph: which are found, what they share, and why others are skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxfact
from fxfact.graph import MacCounter, match
from fxfact.graph.base import conv_call, users_of, viewed_by
from tests.support import apart


class Language(nn.Module):
    """A head whose weight is that of the embedding."""

    def __init__(self, *, functional: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.functional = functional
        self.embedding, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.body(self.embedding(tokens)))
        return F.linear(x, self.embedding.weight) if self.functional else self.head(x)


@pytest.mark.parametrize("capture", ["trace", "modules", "export"])
@pytest.mark.parametrize("functional", [False, True])
def test_a_head_tied_to_an_embedding_stays_and_says_why(capture: Any, functional: bool) -> None:
    tokens = torch.arange(10).reshape(2, 5)
    model: Any = Language(functional=functional).eval()
    options = {"example_inputs": tokens, "capture": capture}
    if capture == "export":
        model, options = torch.export.export(model, (tokens,)), {}
    small = fxfact.factorize(model, "svd", rank=2, verify=True, **options)
    plan = fxfact.plan_of(small)
    assert [decision.path for decision in plan.rewrites] == ["body"]
    reasons = " ".join(decision.reason for decision in plan)
    assert "embedding" in reasons
    assert any(words in reasons for words in ("also read by", "also held by", "called as a function"))


class Shared(nn.Module):
    """One layer on maps, on tokens and on vectors, and another with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.one(x))
        tokens = torch.tanh(self.one(x.flatten(1, 2)))
        return self.two(torch.tanh(self.one(tokens.mean(1))))


@pytest.mark.parametrize("capture", ["trace", "modules"])
def test_a_shared_layer_counts_all_its_positions(capture: Any) -> None:
    model, x = Shared().eval(), torch.randn(2, 3, 4, 8)
    options: dict[str, Any] = {"example_inputs": x, "capture": capture}
    small = fxfact.factorize(model, "svd", rank=2, verify=True, **options)
    one, two = fxfact.plan_of(small).decisions
    assert (two.tied_to, one.tied_to) == ("one", None)
    assert one.before.macs == (12 + 12 + 1) * 64
    assert (one.before.params, two.before.params) == (72, 0)
    assert fxfact.plan_of(small).network.macs == 26 * 64
    data = torch.randn(16, 3, 4, 8).split(8)
    planned = fxfact.factorize(model, budget=fxfact.Params(0.7), calibration=data, likelihood="gaussian", **options)
    assert len(fxfact.plan_of(planned).rewrites) == 2


def test_weights_that_other_operations_read_are_skipped() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normed, self.turned, self.scaled = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.summand = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.normed(x) / self.normed.weight.norm()
            x = self.turned(x) @ self.turned.weight
            return torch.addmm(self.summand, x, self.scaled.weight.t())

    found = {decision.path: decision.reason for decision in fxfact.plan(Read(), "svd", rank=1)}
    assert "is also read by norm" in found["normed"]
    assert "is used by calls with different settings" in found["turned"]
    assert "its bias has the shape (4, 6)" in found["scaled"]


def test_products_of_activations_and_of_constants_are_no_linear_layers() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(4, 6))
            self.experts = nn.Parameter(torch.randn(3, 6, 6))
            self.register_buffer("filters", torch.randn(6, 6))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            scores = torch.softmax(self.queries @ x.transpose(1, 2), -1) @ y
            return torch.bmm(scores @ self.filters, self.experts)

    x = torch.randn(3, 5, 6)
    plan = fxfact.plan(Attention().eval(), "svd", rank=1, example_inputs=(x, x))
    assert [(decision.path, decision.spec) for decision in plan] in ([], [("experts", None)])
    assert plan.network.macs == 4 * 6 * 5 * 2 + 2 * 4 * 36


def test_views_of_a_weight_are_seen_through() -> None:
    weight = nn.Parameter(torch.randn(6, 4))
    root = nn.Module()
    root.weight = weight
    aten = torch.ops.aten
    spellings = {
        "t": lambda graph, w: graph.call_function(aten.t.default, (w,)),
        "T": lambda graph, w: graph.call_function(getattr, (w, "T")),
        "permute": lambda graph, w: graph.call_method("permute", (w, 1, 0)),
        "transpose": lambda graph, w: graph.call_function(torch.transpose, (w, -1, -2)),
    }
    for turn in spellings.values():
        graph = fx.Graph()
        x, read = graph.placeholder("x"), graph.get_attr("weight")
        turned = turn(graph, read)
        product = graph.call_function(torch.matmul, (x, turned))
        graph.output(product)
        call = conv_call(product)
        assert call is not None
        assert (call.weight, call.transposed, viewed_by(turned)) == (read, False, read)
        assert list(users_of(read)) == [product]
        (site,) = match(fx.GraphModule(root, graph)).sites
        assert (site.path, str(site.spec), site.spec.transposed) == ("weight", "Linear(4→6)", False)
    for method, axes in (("permute", (0, 1)), ("neg", ()), ("transpose", (0, 0))):
        graph = fx.Graph()
        assert viewed_by(graph.call_method(method, (graph.get_attr("weight"), *axes))) is None


class Encoder(nn.Module):
    """PyTorch's own attention and encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.embed(x))
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


TOKENS = 7
ATTENTION = TOKENS * (16 * 48 + 16 * 16) + 2 * TOKENS * TOKENS * 16  # the projections, then both products
ENCODER_MACS = TOKENS * 6 * 16 + 2 * (ATTENTION + TOKENS * 2 * 16 * 32) + ATTENTION + 3 * 16


@pytest.mark.parametrize("capture", ["trace", "modules", "export"])
def test_the_layers_of_encoders_are_counted_and_found_or_say_how_to_get_them(capture: Any) -> None:
    model, x = Encoder().eval(), torch.randn(4, TOKENS, 6)
    network: Any = torch.export.export(model, (x,)) if capture == "export" else model
    options: dict[str, Any] = {} if capture == "export" else {"example_inputs": x, "capture": capture}
    with torch.no_grad():
        expected = model(x)
    small = fxfact.factorize(network, "svd", rank=2, verify=True, **options)
    plan = fxfact.plan_of(small)
    assert plan.network.macs == ENCODER_MACS
    rewritten = {decision.path for decision in plan.rewrites}
    skipped = {decision.path: decision.reason for decision in plan if decision.spec is None}
    if capture == "export":
        assert not skipped
        owners = ("attention", "encoder.layers.0.self_attn", "encoder.layers.1.self_attn")
        assert {f"{owner}.{name}" for owner in owners for name in ("in_proj_weight", "out_proj")} <= rewritten
    else:
        assert {"embed", "head"} <= rewritten
        assert all("split_attention of fxfact.nn" in reason for reason in skipped.values())
    if capture == "modules":
        assert {f"encoder.layers.{k}.linear{n}" for k in (0, 1) for n in (1, 2)} <= rewritten
        assert {"attention.in_proj_weight", "attention.out_proj"} <= skipped.keys()
        with torch.no_grad(), MacCounter() as counter:
            small(x)
        assert counter.macs == 4 * (plan.after.macs or 0)
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        same = fxfact.factorize(model, "svd", rank=16, allow_growth=True, **options)
        with torch.no_grad():
            assert apart(expected, same(x)) < 1e-5


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("capture", ["trace", "modules"])
def test_the_macs_of_recurrent_layers_count(kind: Any, capture: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = kind(6, 8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers(x)[0][:, -1])

    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    plan = fxfact.plan(Recurrent().eval(), "svd", rank=1, example_inputs=torch.randn(2, 5, 6), capture=capture)
    assert plan.network.macs == 5 * gates * 8 * (6 + 8 + 8 + 8) + 8 * 3
    assert plan.unreached.macs == plan.network.macs - 8 * 3


@pytest.mark.parametrize("capture", ["trace", "modules"])
def test_zero_tokens_and_single_vectors_run(capture: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)).eval()
    for x in (torch.randn(2, 0, 4), torch.randn(4), torch.randn(1, 4)):
        small = fxfact.factorize(model, "svd", rank=2, example_inputs=x, capture=capture, verify=x.numel() > 0)
        plan = fxfact.plan_of(small)
        assert len(plan.rewrites) == 2
        assert plan.network.macs == (0 if not x.numel() else 4 * 8 + 8 * 6)
        assert small(x).shape == model(x).shape
