"""Attention with linear layers: equal to PyTorch's, and factorized in every front end."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import ArgumentError, ArgumentTypeError, BudgetError, RefusedError
from fxfact.nn import MultiheadAttention, split_attention

WIDTH, HEADS, BATCH, TOKENS, KEYS = 16, 4, 3, 5, 6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attention.eval()


def inputs(attention: nn.MultiheadAttention, *, batched: bool) -> tuple[Tensor, ...]:
    sizes = ((TOKENS, WIDTH), (KEYS, attention.kdim), (KEYS, attention.vdim))
    if not batched:
        return tuple(random(*size, seed=k) for k, size in enumerate(sizes))
    batch_axis = 0 if attention.batch_first else 1
    return tuple(random(BATCH, *size, seed=k).movedim(0, batch_axis) for k, size in enumerate(sizes))


def masks(kind: str, batched: bool) -> dict[str, Tensor]:
    leave_out = random(TOKENS, KEYS, seed=4) > 0.5
    leave_out[:, 0] = False  # a token that attends to nothing is NaN
    padding = random(BATCH, KEYS, seed=5) > 0.5
    padding[:, 0] = False
    padding = padding if batched else padding[0]
    heads = random(BATCH * HEADS if batched else HEADS, TOKENS, KEYS, seed=6)
    return {
        "none": {},
        "pairs": {"attn_mask": leave_out},
        "numbers": {"attn_mask": random(TOKENS, KEYS, seed=7)},
        "heads": {"attn_mask": heads},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": leave_out, "key_padding_mask": padding},
    }[kind]


@pytest.mark.parametrize("kind", ["none", "pairs", "numbers", "heads", "padding", "both"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 7, "vdim": 9, "batch_first": True}], ids=str
)
def test_split_attention_equals_that_of_torch(options: dict[str, Any], batched: bool, kind: str) -> None:
    attention = made(**options)
    split, given = MultiheadAttention.from_torch(attention), inputs(attention, batched=batched)
    for needed, averaged in ((True, True), (True, False), (False, True)):
        asked = {"need_weights": needed, "average_attn_weights": averaged, **masks(kind, batched)}
        found, expected = split(*given, **asked), attention(*given, **asked)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_keep_their_type_and_whether_they_are_trained(dtype: torch.dtype) -> None:
    attention = made().to(dtype)
    attention.in_proj_weight.requires_grad_(False)
    split = MultiheadAttention.from_torch(attention)
    assert {parameter.dtype for parameter in split.parameters()} == {dtype}
    trained = {name: parameter.requires_grad for name, parameter in split.named_parameters()}
    assert [name for name in trained if not trained[name]] == ["q_proj.weight", "k_proj.weight", "v_proj.weight"]
    assert not split.training
    assert MultiheadAttention.from_torch(attention.train()).training
    with torch.no_grad():
        split.q_proj.weight.zero_()
    assert bool(attention.in_proj_weight.all())


class Translator(nn.Module):
    """PyTorch's transformer, which has attention over itself and over another sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Transformer(WIDTH, HEADS, 2, 1, 24, 0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, x[:, :4]).mean(1))


@pytest.mark.parametrize("training", [True, False])
def test_transformer_of_torch_computes_the_same(training: bool) -> None:
    model = Translator().train(training)
    for module in model.modules():
        module.dropout = 0.0 if isinstance(module, nn.MultiheadAttention) else getattr(module, "dropout", None)
        module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split, x = split_attention(model), random(BATCH, TOKENS, WIDTH)
    torch.testing.assert_close(split(x), model(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # in evaluation mode the model takes the fused operator
        torch.testing.assert_close(split(x), model(x), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.MultiheadAttention) for module in split.modules())
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    split(x).sum().backward()
    assert all(parameter.grad is not None for parameter in split.parameters())


class Classifier(nn.Module):
    def __init__(self, *, mask: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mask = torch.ones(TOKENS, TOKENS).triu(1).bool() if mask else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False, attn_mask=self.mask)[0]
        return self.head(x.mean(1))


@pytest.mark.parametrize(("model", "how"), [(Classifier(), "trace"), (Classifier(mask=True), "modules")])
def test_projections_are_factorized_after_the_split(model: nn.Module, how: Any) -> None:
    x, split = random(32, TOKENS, 8), split_attention(model.eval())
    small = fxfact.factorize(split, budget=fxfact.Macs(0.4), calibration=x.split(8), capture=how, verify=True)
    plan = fxfact.plan_of(small)
    assert {f"attention.{name}_proj" for name in ("q", "k", "out")} <= {decision.path for decision in plan.rewrites}
    assert fxfact.verify(split, small, x).ok
    program = torch.export.export(small, (x,))
    torch.testing.assert_close(program.module()(x), small(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(small, backend="aot_eager", fullgraph=True)(x), small(x))
    if how == "modules":
        torch.testing.assert_close(pickle.loads(pickle.dumps(small))(x), small(x))


def test_budget_out_of_reach_names_the_split() -> None:
    x = random(16, TOKENS, 8)
    with pytest.raises(BudgetError, match=r"those that have to stay \(.*split_attention of fxfact\.nn makes"):
        fxfact.factorize(Classifier().eval(), budget=fxfact.Macs(0.3), calibration=x.split(4))


def test_attention_shared_by_two_paths_stays_shared() -> None:
    first = made()
    split = split_attention(nn.ModuleList([first, nn.ModuleList([first])]))
    assert isinstance(split, nn.ModuleList)
    assert isinstance(split[0], MultiheadAttention)
    assert split[0] is split[1][0]
    assert isinstance(split_attention(first), MultiheadAttention)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_attention_with_added_tokens_is_refused_with_its_path(options: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=r"^1: add_bias_kv and add_zero_attn add tokens"):
        split_attention(nn.ModuleList([nn.Identity(), made(**options)]))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ArgumentTypeError, match=r"expected a torch\.nn\.MultiheadAttention, got Linear"):
        MultiheadAttention.from_torch(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"expected a torch\.nn\.Module, got int"):
        split_attention(3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="num_heads must divide embed_dim=16, got 3"):
        MultiheadAttention(16, 3)
    x = random(2, 3, 16)
    with pytest.raises(ArgumentError, match=r"is_causal=True says what attn_mask is\. Pass the mask"):
        MultiheadAttention(16, 4)(x, x, x, is_causal=True)
