"""TensorLy-Torch 0.5, as installed: layers, models and checkpoints that move over, and the table of the README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact.nn as fnn
from fxfact.errors import ArgumentError, ArgumentTypeError, FxfactError, RankError, RefusedError
from tests.support import apart, copied_state, has_state

tltorch: Any = pytest.importorskip("tltorch", reason="needs the extra tltorch")

pytestmark = pytest.mark.integration

KERNELS = {1: (5,), 2: (3, 3), 3: (3, 2, 3)}
FACTORIZATIONS = ["cp", "tucker", "tt"]
VARIANTS = [
    *((name, how) for name in FACTORIZATIONS for how in ("factorized", "reconstructed", "mobilenet")),
    ("dense", "reconstructed"),
]
variants = pytest.mark.parametrize(("factorization", "implementation"), VARIANTS)


def theirs(factorization: str, implementation: str, order: int = 2, **settings: Any) -> Any:
    torch.manual_seed(0)
    options = {"rank": 0.5, "bias": True, "stride": 2, "padding": 1, **settings}
    layer = tltorch.FactorizedConv(
        6,
        8,
        options.pop("kernel_size", KERNELS[order]),
        factorization=factorization,
        implementation=implementation,
        **options,
    )
    layer.reset_parameters(0.1)
    nn.init.normal_(layer.bias) if layer.bias is not None else None
    return layer


def sample(order: int = 2) -> Tensor:
    return torch.randn(2, 6, *[9] * order, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("order", [1, 2, 3])
@variants
def test_moved_layer_equals_the_original(factorization: str, implementation: str, order: int) -> None:
    if (implementation, order) == ("mobilenet", 1) and factorization == "cp":
        settings = {"stride": 1, "padding": 0}  # lists of one int fail in TensorLy-Torch 0.5
    else:
        settings = {}
    layer, x = theirs(factorization, implementation, order, **settings), sample(order)
    before = copied_state(layer)
    moved = fnn.from_tltorch(layer)
    assert apart(layer(x), moved(x)) < 1e-5
    assert has_state(layer, before)
    assert all(p.requires_grad for p in moved.parameters())
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.zero_()
    assert has_state(layer, before)


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": False},
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
        {"rank": 2.0},
        {"rank": 40},
        {"kernel_size": (1, 3)},
        {"kernel_size": (1, 1), "padding": 0},
        {"dtype": torch.float64},
    ],
    ids=str,
)
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_moved_layer_keeps_settings_and_any_rank(factorization: str, settings: dict[str, Any]) -> None:
    layer = theirs(factorization, "factorized", **settings)
    moved, x = fnn.from_tltorch(layer), sample().to(settings.get("dtype", torch.float32))
    assert apart(layer(x), moved(x)) < 1e-5
    assert {p.dtype for p in moved.parameters()} == {x.dtype}


def test_moved_layer_keeps_mode_and_frozen_parameters() -> None:
    layer = theirs("tucker", "factorized").eval().requires_grad_(False)
    moved = fnn.from_tltorch(layer)
    assert not moved.training
    assert not any(p.requires_grad for p in moved.parameters())
    layer.weight.core.requires_grad_()
    with pytest.warns(UserWarning, match="frozen and trained"):
        assert all(p.requires_grad for p in fnn.from_tltorch(layer).parameters())


class Network(nn.Module):
    """Layers of a package at three paths, two of them one module, around others."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks = layers[0], nn.ModuleList(layers[1:])
        self.again = layers[1]
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(self.again(x).mean((2, 3)))


def their_network() -> Network:
    made = [("cp", 6), ("tucker", 8), ("tt", 8), ("dense", 8)]
    layers = []
    for factorization, channels in made:
        how = "reconstructed" if factorization == "dense" else "factorized"
        torch.manual_seed(channels)
        layers.append(
            tltorch.FactorizedConv(
                channels,
                8,
                3,
                order=2,
                padding=1,
                bias=True,
                rank=(4, 4, 3, 3) if factorization == "tucker" else 0.5,
                factorization=factorization,
                implementation=how,
            )
        )
        layers[-1].reset_parameters(0.2)
    return Network(*layers).eval()


def our_network() -> Network:
    return Network(
        fnn.CPConv(6, 8, 3, order=2, padding=1, rank=0.5),
        fnn.TuckerConv(8, 8, 3, order=2, padding=1, rank=(4, 4, 3, 3)),
        fnn.TTConv(8, 8, 3, order=2, padding=1, rank=0.5),
        nn.Conv2d(8, 8, 3, padding=1),
    ).eval()


def test_model_moves_with_all_its_layers() -> None:
    model, x = their_network(), sample()
    moved = fnn.from_tltorch(model)
    assert apart(model(x), moved(x)) < 1e-5
    assert moved.again is moved.blocks[0]
    assert isinstance(moved, Network)
    assert moved.head.weight.data_ptr() != model.head.weight.data_ptr()
    assert not any(type(m).__module__.startswith("tltorch") for m in moved.modules())
    assert torch.fx.symbolic_trace(moved)(x).equal(moved(x))


def test_checkpoint_loads_into_a_model_of_our_layers() -> None:
    model, ours, x = their_network(), our_network(), sample()
    fnn.load_tltorch_state_dict(ours, model.state_dict())
    assert apart(model(x), ours(x)) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
@variants
def test_checkpoint_of_every_variant_loads(factorization: str, implementation: str, order: int) -> None:
    layer = theirs(factorization, implementation, order)
    ours = fnn.from_tltorch(layer)
    expected = ours(sample(order))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    fnn.load_tltorch_state_dict(ours, layer.state_dict())
    assert apart(expected, ours(sample(order))) < 1e-6


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda state: state.pop("first.weight.factors.factor_1"), ArgumentError, r"^first: .* writes weight\.factors"),
        (lambda state: state.update({"first.factors.0": torch.ones(2)}), ArgumentError, "^first: .*factors.0"),
        (lambda state: state.pop("first.bias"), ArgumentError, "^first: "),
        (
            lambda state: state.pop("head.weight"),
            ArgumentError,
            "head.weight: the model has .*, the state dict nothing",
        ),
        (lambda state: state.update(more=torch.ones(2)), ArgumentError, "more: the model has nothing"),
        (lambda state: state.update({"blocks.2.weight.tensor": torch.ones(2, 2)}), ArgumentError, "dense kernel"),
        (
            lambda state: state.update(
                {f"first.weight.factors.factor_{k}": torch.ones(n, 3) for k, n in enumerate((8, 6, 3, 3))},
                **{"first.weight.weights": torch.ones(3)},
            ),
            RankError,
            r"^first: the state dict has the rank \(3,\)",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_before_anything_is_loaded(
    change: Any, error: type[FxfactError], words: str
) -> None:
    state, ours = their_network().state_dict(), our_network()
    change(state)
    before = copied_state(ours)
    with pytest.raises(error, match=words):
        fnn.load_tltorch_state_dict(ours, state)
    assert has_state(ours, before)


def test_checkpoint_of_another_factorization_is_refused() -> None:
    for ours in (fnn.TTConv(6, 8, 3, order=2, rank=2), fnn.CPConv(6, 8, 5, order=2, rank=2)):
        with pytest.raises(ArgumentError, match="CPTensor for a kernel"):
            fnn.load_tltorch_state_dict(ours, theirs("cp", "factorized").state_dict())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: "layer", ArgumentTypeError, "got str"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 3)), ArgumentTypeError, "Sequential has no FactorizedConv"),
        (lambda: theirs("ComplexCP", "reconstructed", dtype=torch.complex64), RefusedError, "ComplexCPTensor"),
    ],
)
def test_what_cannot_be_moved_is_refused(make: Any, error: type[FxfactError], words: str) -> None:
    with pytest.raises(error, match=words):
        fnn.from_tltorch(make())


def test_hooks_are_not_lost_in_silence() -> None:
    layer = theirs("tucker", "factorized")
    layer.register_forward_hook(lambda *args: None)
    with pytest.raises(RefusedError, match=r"^0: it has hooks"):
        fnn.from_tltorch(nn.Sequential(layer))


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_tensor_dropout_moves_with_its_options(factorization: str) -> None:
    layer, x = theirs(factorization, "factorized"), sample()
    tltorch.tensor_dropout(layer.weight, 0.25, min_dim=2, min_values=2)
    moved = fnn.from_tltorch(layer)
    assert (moved.rank_dropout.p, moved.rank_dropout.min_dim, moved.rank_dropout.min_values) == (0.25, 2, 2)
    assert moved.rank_dropout.training
    tltorch.remove_tensor_dropout(layer.weight)
    assert apart(layer(x), moved.eval()(x)) < 1e-5


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_gains_of_a_tensor_lasso_become_part_of_the_factors(factorization: str) -> None:
    layer, x = theirs(factorization, "factorized"), sample()
    lasso = tltorch.tensor_lasso(factorization)
    lasso.apply(layer.weight)
    lasso.set_weights(layer.weight, 0.5)
    with pytest.warns(UserWarning, match="tensor_lasso"):
        moved = fnn.from_tltorch(layer)
    assert apart(layer(x), moved(x)) < 1e-5
    ours = fnn.from_tltorch(theirs(factorization, "factorized"))
    fnn.load_tltorch_state_dict(ours, layer.state_dict())
    assert apart(layer(x), ours(x)) < 1e-5


def their_joint(factorization: str, n_layers: Any, implementation: str = "factorized") -> Any:
    torch.manual_seed(0)
    rank = {"cp": 5, "tucker": (2,) * (1 if isinstance(n_layers, int) else 2) + (4, 3, 2, 3), "tt": 0.3}[factorization]
    joint = tltorch.FactorizedConv(
        6,
        8,
        (3, 3),
        padding=1,
        bias=True,
        n_layers=n_layers,
        rank=rank,
        factorization=factorization,
        implementation=implementation,
    )
    joint.reset_parameters(0.1)
    return joint


@pytest.mark.parametrize("implementation", ["factorized", "reconstructed"])
@pytest.mark.parametrize("n_layers", [3, (2, 3)])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_joint_layer_moves_with_its_convolutions(factorization: str, n_layers: Any, implementation: str) -> None:
    joint, x = their_joint(factorization, n_layers, implementation), sample()
    places = [0, 1, 2] if n_layers == 3 else [(0, 0), (1, 2), (0, 1)]
    joint.set(places[1], stride=2, padding=0, bias=torch.randn(8))
    ours = fnn.from_tltorch(joint)
    for place in places:
        assert apart(joint.get_conv(place)(x), ours[place](x)) < 1e-5
    expected = ours[places[1]](x)
    ours.reset_parameters()
    fnn.load_tltorch_state_dict(ours, joint.state_dict())
    assert ours[places[1]](x).equal(expected)


def test_model_moves_with_the_convolutions_of_a_joint_layer() -> None:
    joint, x = their_joint("tucker", 3), sample()
    model = nn.Sequential(joint[0], nn.Conv2d(8, 6, 1), joint[2])
    moved = fnn.from_tltorch(model)
    assert apart(model(x), moved(x)) < 1e-5
    assert moved[0].joint is moved[2].joint
    for parameter in moved[0].joint.parameters():
        nn.init.zeros_(parameter)
    fnn.load_tltorch_state_dict(moved, model.state_dict())
    assert apart(model(x), moved(x)) < 1e-5


def test_other_layers_of_tensorly_torch_are_named() -> None:
    linear = tltorch.FactorizedLinear((4, 4), (2, 2), rank=0.5)
    with pytest.warns(UserWarning, match="stay as they are: 1$"):
        moved = fnn.from_tltorch(nn.Sequential(theirs("cp", "factorized"), linear))
    assert type(moved[1]) is type(linear)


# The table of the README

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\| `(.*?)` \| `(.*?)` \|$",
    README.split("| TensorLy-Torch 0.5 | fxfact.nn |")[1].split("\n\n")[0],
    flags=re.MULTILINE,
)
CONV = nn.Conv2d(6, 8, 3, padding=1)


def value_of(code: str, **names: Any) -> Any:
    """Run statements, and return the value of the last one if it is an expression."""
    *statements, last = code.split("; ")
    namespace = {"tltorch": tltorch, "fnn": fnn, "conv": CONV, "convs": [CONV] * 3, "x": sample(), **names}
    exec("\n".join(statements), namespace)
    return eval(last, namespace)


def output_of(made: Any) -> Tensor | None:
    """The output of a layer, or the tensor that was made."""
    if isinstance(made, nn.Module) and not type(made).__name__.endswith("Tensor"):
        order = made.main_conv.order if hasattr(made, "main_conv") else getattr(made, "order", 2)
        return made(torch.randn(2, 6, *[9] * order, generator=torch.Generator().manual_seed(2)))
    return made if isinstance(made, Tensor) else None


@pytest.mark.parametrize(("there", "here"), ROWS)
def test_row_of_the_table_runs_there_and_here(there: str, here: str) -> None:
    layer, train = theirs("cp", "factorized"), theirs("tt", "factorized")
    before = fnn.from_tltorch(layer)
    model = their_network()
    names = {"layer": layer, "train": train, "model": model, "state": model.state_dict()}
    ours = {"layer": before, "train": fnn.from_tltorch(train), "model": our_network(), "state": model.state_dict()}
    theirs_made, ours_made = value_of(there, **names), value_of(here, **ours)
    first, second = output_of(theirs_made), output_of(ours_made)
    assert (first is None) == (second is None) or "tensor_" in here
    if "load" in here:
        assert apart(model(sample()), ours["model"](sample())) < 1e-5
    elif "from_conv(" in there and "decompose_weights" not in there:
        exact = CONV(torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(2)))
        assert apart(exact, second) < 1.1 * apart(exact, first)
    elif "(layer" in there or there.startswith("layer.weight") or "transduct" in there:
        expected, found = (first, second) if first is not None else (layer(sample()), before.eval()(sample()))
        if "dropout" not in there or "remove" in there:
            assert apart(expected, found) < 1e-5
    elif first is not None and second is not None:
        assert first.shape == second.shape


def test_table_has_a_row_for_each_part() -> None:
    assert len(ROWS) >= 20
