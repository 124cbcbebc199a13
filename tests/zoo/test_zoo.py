"""The zoo: third-party models as they are, factorized in one call. ``pytest -m zoo -n 0``, with the extra [zoo].

At the end the table of benchmarks/README.md is written to benchmarks/results/zoo.md.
"""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxfact
from fxfact.utils import relative_error, tensors_of
from tests.zoo.zoo_models import ZOO, ZooModel

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]
METHODS = ["tucker", "cp", "spatial_svd", "channel_svd", "svd"]
WITH_INDUCTOR = {"pytorchcv resnet", "monai BasicUNet", "HF ResNet", "HF Encodec", "diffusers AutoencoderKLWan"}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
KINDS = {
    "depthwise": "depthwise",
    "single": "one channel",
    "even at rank 1": "too small",
    "does not call": "not called",
    "called as a function": "function",
    "computes its weight": "computed weight",
    "weight is also": "weight read elsewhere",
}


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    yield found
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "zoo.json").write_text(json.dumps(found, indent=1))
    (RESULTS / "zoo.md").write_text(table(found))


def models() -> list[Any]:
    missing = {m.library for m in ZOO if importlib.util.find_spec(m.library) is None}
    reason = "not installed: pip install -e '.[zoo]'"
    return [
        pytest.param(m, id=m.name, marks=pytest.mark.skipif(m.library in missing, reason=f"{m.library} {reason}"))
        for m in ZOO
    ]


@pytest.mark.parametrize("entry", models())
def test_one_call(entry: ZooModel, rows: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model, inputs = entry.build().eval(), entry.inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"rank": 0.5, "allow_growth": True, "fold_weights": True, "example_inputs": inputs}
    result = fxfact.factorize(model, METHODS, **options)
    plan = fxfact.plan_of(result)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(bool(d.reason) == (d.factorization is None) for d in plan)
    verified = fxfact.verify(model, result, inputs)
    assert verified.graph <= 1e-4
    if plan.rewrites:
        dense = sum(parameter.numel() for parameter in model.parameters())
        assert sum(parameter.numel() for parameter in result.parameters()) < dense
        a_training_step(model, result, inputs)
    row = counted(entry, model, plan, verified)
    row["compiles"] = holds(compiled, "aot_eager", model, result, inputs)
    row["exports"] = holds(exported, None, model, result, inputs)
    if entry.name in WITH_INDUCTOR:
        assert holds(compiled, "inductor", model, result, inputs)
    rows.append(row)


def test_nearly_all_is_rewritten(rows: list[dict[str, Any]]) -> None:
    assert len(rows) >= 60
    assert len({row["library"] for row in rows}) >= 4
    wide = sum(row["wide"] for row in rows)
    assert sum(row["wide_rewritten"] for row in rows) >= 0.95 * wide


def call(network: Any, inputs: Any) -> Any:
    torch.manual_seed(0)
    return network(**inputs) if isinstance(inputs, dict) else network(*inputs)


def a_training_step(model: nn.Module, result: nn.Module, inputs: Any) -> None:
    """In training mode where the model itself can be trained so, else in evaluation mode."""
    try:
        loss_of(model.train(), inputs).backward()
        result.train()
    except Exception:
        result.eval()
    finally:
        model.eval()
    for module in result.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1  # one model has 0.999, through which nothing is learned in a step
    optimizer = torch.optim.SGD(result.parameters(), 1e-3)
    loss_of(result, inputs).backward()
    stages = [p for d in fxfact.plan_of(result).rewrites for p in result.get_submodule(d.path).parameters()]
    assert any(p.grad is not None and bool(p.grad.any()) for p in stages)
    optimizer.step()
    assert math.isfinite(float(loss_of(result, inputs)))
    result.eval()


def loss_of(network: nn.Module, inputs: Any) -> Tensor:
    outputs = [y for y in tensors_of(call(network, inputs)) if y.is_floating_point() and y.requires_grad]
    return sum((y.float().square().mean() for y in outputs), torch.zeros(()))


def holds(check: Any, how: Any, model: nn.Module, result: nn.Module, inputs: Any) -> bool:
    """Whether the result passes; where it does not, the model must not either."""
    try:
        check(how, result, inputs)
    except Exception as error:
        try:
            check(how, model, inputs)
        except Exception:
            return False
        raise AssertionError(f"the model passes {check.__name__}, the result does not") from error
    return True


def compiled(backend: str, network: nn.Module, inputs: Any) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        expected = call(network, inputs)
        assert relative_error(expected, call(torch.compile(network, backend=backend), inputs)) < 1e-3


def exported(_: None, network: nn.Module, inputs: Any) -> None:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    with torch.no_grad():
        expected = call(network, inputs)
        torch.manual_seed(0)
        program = torch.export.export(network, args, kwargs, strict=False)
        assert relative_error(expected, call(program.module(), inputs)) < 1e-3


def counted(entry: ZooModel, model: nn.Module, plan: fxfact.Plan, verified: fxfact.Verification) -> dict[str, Any]:
    refused = Counter(kind_of(d.reason) for d in plan if d.factorization is None)
    kernels = {d.path: kernel_of(model, d) for d in plan}
    depthwise = [path for path, (size, groups, channels) in kernels.items() if groups > 1 and groups == channels]
    pointwise = [path for path, (size, groups, channels) in kernels.items() if set(size) == {1}]
    linear = [d for d in plan if kernels[d.path][0] == () and kind_of(d.reason) != "function"]
    wide = [d for d in plan if d.path not in (*depthwise, *pointwise) and d not in linear]
    return {
        "model": entry.name,
        "library": entry.library,
        "task": entry.task,
        "frontend": plan.capture,
        "found": len(plan),
        "rewritten": len(plan.rewrites),
        "refused": dict(refused),
        "wide": len(wide),
        "wide_rewritten": sum(d.factorization is not None for d in wide),
        "linear": len(linear),
        "linear_rewritten": sum(d.factorization is not None for d in linear),
        "reached_by_convolutions": reached([d for d in plan.rewrites if d not in linear], plan),
        "reached": reached(plan.rewrites, plan),
        "depthwise": len(depthwise),
        "error": verified.graph,
        "why": list(plan.refused),
    }


def reached(rewrites: Sequence[fxfact.Decision], plan: fxfact.Plan) -> float:
    """The share of the network's MACs that are in these layers before."""
    return sum(d.before.macs or 0 for d in rewrites) / (plan.network.macs or 1)


def kernel_of(model: nn.Module, decision: fxfact.Decision) -> tuple[tuple[int, ...], int, int]:
    """Kernel size (that of a linear layer is empty), groups and input channels, if need be from the module itself."""
    try:
        found: Any = decision.spec or model.get_submodule(decision.path)
        return found.kernel_size, found.groups, found.in_channels
    except AttributeError:
        return (), 1, 0


def kind_of(reason: str) -> str:
    return next((kind for words, kind in KINDS.items() if words in reason), reason)


def table(found: list[dict[str, Any]]) -> str:
    def line(row: dict[str, Any]) -> list[Any]:
        refused = ", ".join(f"{count} {kind}" for kind, count in row["refused"].items())
        marks = ["yes" if row[key] else "neither" for key in ("compiles", "exports")]
        shares = [f"{row[key]:.0%}" for key in ("reached_by_convolutions", "reached")]
        start = [row["model"], row["frontend"], row["found"], row["rewritten"]]
        return [*start, *shares, refused, f"{row['error']:.0e}", *marks]

    headers = ["model", "capture", "found", "rewritten", "MACs reached by convolutions", "and linear layers"]
    headers += ["left dense", "graph error", "compiles", "exports"]
    sums = {key: sum(row[key] for row in found) for key in ("found", "wide", "wide_rewritten")}
    sums |= {key: sum(row[key] for row in found) for key in ("linear", "linear_rewritten")}
    means = [sum(row[key] for row in found) / len(found) for key in ("reached_by_convolutions", "reached")]
    total = (
        f"{len(found)} models; {sums['found']} layers. {sums['wide']} convolutions have a kernel above 1 and are not "
        f"depthwise: {sums['wide_rewritten']} are rewritten ({sums['wide_rewritten'] / sums['wide']:.1%}). "
        f"{sums['linear']} are linear: {sums['linear_rewritten']} are rewritten. The convolutions that are rewritten "
        f"have {means[0]:.1%} of a model's MACs in the mean, and with linear layers {means[1]:.1%}."
    )
    return f"{tabulate(map(line, found), headers, tablefmt='github')}\n\n{total}\n"


warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
