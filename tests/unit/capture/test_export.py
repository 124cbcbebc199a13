"""The front end 'export': an exported program is factorized into an exported program."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import fxfact
from fxfact.errors import ArgumentError, CaptureError
from fxfact.passes import pass_history
from tests.support import Small, apart

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class TwoOutputs(nn.Module):
    """Convolutions are its outputs; a keyword argument; a buffer that forward counts in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *, shift: Tensor) -> dict[str, Tensor]:
        self.calls.add_(1)
        x = self.first(x)
        return {"first": x, "up": self.up(F.relu(x + shift))}


def program(dynamic: bool = True) -> tuple[nn.Module, ExportedProgram, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x, shift = TwoOutputs().eval(), torch.randn(2, 4, 8, 10), torch.randn(2, 1, 1, 1)
    batch, height = Dim("batch", min=2, max=64), Dim("height", min=4)
    shapes = {"x": {0: batch, 2: height, 3: Dim.AUTO}, "shift": {0: batch}} if dynamic else None
    return model, export(model, (x,), {"shift": shift}, dynamic_shapes=shapes), x, shift


def test_program_is_called_by_the_class_of_its_model(tmp_path: Path) -> None:
    _, exported, *_ = program()
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert {fxfact.plan(each).model for each in (exported, loaded)} == {"TwoOutputs"}
    for node in exported.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    assert fxfact.plan(exported).model == "ExportedProgram"


def test_export_keeps_shapes_names_and_stack_traces(tmp_path: Path) -> None:
    _, before, x, shift = program()
    state = {name: value.clone() for name, value in before.state_dict.items()}
    after = fxfact.factorize(before, rank=0.5, verify=True)
    assert fxfact.plan_of(after).capture == "export"
    assert len(fxfact.plan_of(after).rewrites) == 2
    assert all(value.equal(state[name]) for name, value in before.state_dict.items())
    assert after.state_dict["calls"].equal(state["calls"])
    assert str(after.range_constraints) == str(before.range_constraints)
    old, new = before.graph_signature, after.graph_signature
    assert (new.user_inputs, new.user_outputs) == (old.user_inputs, old.user_outputs)
    assert after.call_spec == before.call_spec
    assert {"first.0.weight", "first.2.bias", "up.1.weight", "calls"} <= set(after.state_dict)
    assert not {"first.weight", "up.bias"} & set(after.state_dict)
    convs = [node for node in after.graph.nodes if "aten.conv" in str(node.target)]
    assert len(convs) == 6
    assert all(node.meta["stack_trace"] and node.meta["nn_module_stack"] for node in convs)
    torch.export.save(after, tmp_path / "after.pt2")
    loaded = torch.export.load(tmp_path / "after.pt2")
    larger = torch.randn(5, 4, 9, 13)
    ours, theirs = (
        after.module()(larger, shift=larger[:, :1, :1, :1]),
        loaded.module()(larger, shift=larger[:, :1, :1, :1]),
    )
    assert ours["up"].shape == (5, 6, 20, 28)
    assert ours["up"].equal(theirs["up"])
    assert after.module()(x, shift=shift)["first"].shape == (2, 8, 8, 10)


def test_program_at_full_rank_computes_the_same() -> None:
    model, before, x, shift = program(dynamic=False)
    for source in (before, before.run_decompositions()):
        after = fxfact.factorize(source, "channel_svd", rank=10**6, allow_growth=True, verify=True)
        found, expected = after.module()(x, shift=shift), model(x, shift=shift)
        assert all(apart(expected[name], found[name]) < 1e-5 for name in expected)


def test_plan_is_applied_to_a_program_and_the_result_factorized_again(small: Small, image: Tensor) -> None:
    before = export(small, (image,))
    plan = fxfact.plan(before, "tucker", rank=0.5)
    assert plan.network.macs == fxfact.plan(small, example_inputs=image).network.macs
    assert "captured as an exported program" in str(plan)
    after = fxfact.apply(fxfact.Plan.from_json(plan.to_json()), before)
    assert apart(fxfact.apply(plan, before).module()(image), after.module()(image)) == 0
    assert "tucker" in str(fxfact.inspect(after))
    assert "conv2d_2" in fxfact.diff(before, after).table()
    again = fxfact.factorize(after, "spatial_svd", include="*.1", verify=True)
    assert [d.path for d in fxfact.plan_of(again).rewrites] == ["first.1", "second.1"]
    assert [len(pass_history(some)) for some in (before, after, again)] == [0, 1, 2]
    untouched = fxfact.factorize(before, exclude="*")
    assert untouched.module()(image).equal(before.module()(image))


def test_plan_for_a_module_is_applied_to_its_program(small: Small, image: Tensor) -> None:
    plan, program = fxfact.plan(small, "tucker", rank=0.5, example_inputs=image), export(small, (image,))
    after = fxfact.apply(plan, program)
    assert fxfact.plan_of(after) == replace(plan, capture="export")
    assert fxfact.verify(program, after, image).ok
    assert apart(fxfact.apply(plan, small)(image), after.module()(image)) < 1e-5


def test_loaded_program_is_factorized(small: Small, image: Tensor) -> None:
    file = io.BytesIO()
    torch.export.save(export(small, (image,)), file)
    file.seek(0)
    after = fxfact.factorize(torch.export.load(file), rank=0.5, verify=True)
    assert len(fxfact.plan_of(after).rewrites) == 2


def test_program_in_the_wrong_form_is_refused(small: Small, image: Tensor) -> None:
    whole = export(small, (image,))
    with pytest.raises(ArgumentError, match="captured by 'export'"):
        fxfact.plan(whole, capture="trace")
    with pytest.raises(CaptureError, match=r"module\(\) of an ExportedProgram.*\. Pass the ExportedProgram\."):
        fxfact.plan(whole.module())
    with pytest.raises(CaptureError, match=r"GraphModule at 0 is the module\(\).*Use the original module there"):
        fxfact.plan(nn.Sequential(whole.module()))
    whole._example_inputs = None
    with pytest.raises(CaptureError, match="no example_inputs"):
        fxfact.plan(whole)
