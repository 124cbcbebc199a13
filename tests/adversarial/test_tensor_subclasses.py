"""Networks whose convolutions stand beside parameters of tensor classes that wrap others, such as quantized weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import fxfact
from fxfact.errors import CalibrationError, CaptureError, FileError
from fxfact.utils import alias_copy, copy_structure
from tests.support import FakeTimer


class Opaque(Tensor):
    """int8 values times a scale, which only copies and matrix products understand."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Opaque:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)  # type: ignore

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("detach", "clone", "alias"):
            return type(args[0])(func(args[0].values), func(args[0].scale))
        if name in ("linear", "t", "addmm", "mm"):
            args, kwargs = tree_map_only(Opaque, lambda tensor: tensor.values * tensor.scale, (args, kwargs or {}))
            return func(*args, **kwargs)
        raise NotImplementedError(f"{cls.__name__} has no {name}")

    __torch_function__ = torch._C._disabled_torch_function_impl


class Scaled(Opaque):
    """The same, with its inner tensors known to PyTorch."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Scaled:
        return Scaled(inner["values"], inner["scale"])


class Dequantizable(Scaled):
    """The same, with a method that returns the plain tensor."""

    def dequantize(self) -> Tensor:
        return self.values * self.scale


class NoGradient(Scaled):
    """A class whose products pass no gradients on."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is not nn.functional.linear:
                return func(*args, **(kwargs or {}))
            return nn.functional.linear(args[0].detach(), *(tensor.detach() for tensor in args[1:]))


def scaled(kind: type[Opaque]) -> Callable[[nn.Module], None]:
    def quantize(model: nn.Module) -> None:
        for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
            scale = layer.weight.detach().abs().max() / 127
            values = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(kind(values, scale), requires_grad=False)

    return quantize


def torchao(config: str) -> Callable[[nn.Module], None]:
    def quantize(model: nn.Module) -> None:
        package = pytest.importorskip("torchao.quantization")
        package.quantize_(model, getattr(package, config)())

    return quantize


def network(convs: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in convs.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        pooled = [convs, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
        return nn.Sequential(*pooled, nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1-D": (lambda: nn.Sequential(nn.Conv1d(6, 12, 5), nn.ReLU(), nn.Conv1d(12, 16, 3, groups=2)), (6, 16)),
    "2-D": (lambda: nn.Sequential(nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 16, 3)), (6, 9, 9)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(6, 16, 3, stride=2), nn.Conv2d(16, 16, 3)), (6, 5, 5)),
    "3-D": (lambda: nn.Sequential(nn.Conv3d(6, 12, 3), nn.ReLU(), nn.Conv3d(12, 16, 1)), (6, 5, 5, 5)),
}
CASES = {
    "own, trace, 2-D": (scaled(Scaled), "trace", "2-D"),
    "own, modules, 1-D": (scaled(Dequantizable), "modules", "1-D"),
    "own, export, transposed": (scaled(Scaled), "export", "transposed"),
    "int8, trace, 3-D": (torchao("Int8WeightOnlyConfig"), "trace", "3-D"),
    "dynamic int8, modules, 2-D": (torchao("Int8DynamicActivationInt8WeightConfig"), "modules", "2-D"),
    "float8, export, 1-D": (torchao("Float8WeightOnlyConfig"), "export", "1-D"),
    "4 bits, trace, transposed": (torchao("IntxWeightOnlyConfig"), "trace", "transposed"),
}


@pytest.fixture(autouse=True)
def safe_classes() -> Iterator[None]:
    with torch.serialization.safe_globals([Scaled, Dequantizable]):
        yield


def prepared(name: str) -> tuple[Any, Any, Tensor, dict[str, Any]]:
    """The model, what to factorize, inputs, and options of the front end."""
    quantize, capture, kind = CASES[name]
    make, size = CONVS[kind]
    model, x = network(make()), torch.randn(4, *size, generator=torch.Generator().manual_seed(1))
    quantize(model)
    if capture == "export":
        return model, torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)), x, {}
    return model, model, x, {"capture": capture, "example_inputs": x}


def call(network: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = (network if isinstance(network, nn.Module) else network.module())(x)
    return output


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("name", CASES)
def test_networks_with_quantized_layers_are_factorized_checked_and_saved(name: str, tmp_path: Path) -> None:
    model, source, x, options = prepared(name)
    before = call(source, x)
    small = fxfact.factorize(source, rank=0.5, allow_growth=True, verify=True, **options)
    plan = fxfact.plan_of(small)
    assert plan.rewrites
    verified = fxfact.verify(source, small, x)
    assert verified.ok
    assert verified.changed == ()
    assert len(fxfact.inspect(small).rows) >= 2
    assert call(copy.deepcopy(small), x).equal(call(small, x))
    assert call(fxfact.apply(plan, source), x).equal(call(small, x))
    path = tmp_path / ("small.pt" if isinstance(small, nn.Module) else "small.pt2")
    fxfact.save(small, path)
    loaded = fxfact.load(path, *([model] if isinstance(small, nn.Module) else []))
    assert call(loaded, x).equal(call(small, x))
    assert call(source, x).equal(before)


@pytest.mark.parametrize("name", [name for name, (_, capture, _) in CASES.items() if capture != "export"])
def test_networks_with_quantized_layers_are_planned_on_data_and_brought_nearer(name: str) -> None:
    model, _, x, options = prepared(name)
    batches = [x, 2 * x, x - 1, -x]
    small = fxfact.factorize(model, "tucker", budget=fxfact.Params(0.9), calibration=batches, **options)
    plan = fxfact.plan_of(small)
    assert plan.uses_statistics
    assert call(fxfact.apply(plan, model, calibration=batches), x).isfinite().all()
    assert all(decision.path.startswith("0.") for decision in plan.rewrites)
    report = fxfact.report(model, small, x)
    assert (report.ok, report.changed) == (True, ())
    refitted, _ = fxfact.refit(small, model, batches)
    trained, _ = fxfact.distill(small, model, batches, steps=2)
    for network in (refitted, trained):
        assert type(network.get_submodule("4").weight) is type(model[4].weight)
    fast = fxfact.for_inference(small, x, timer=FakeTimer())
    assert torch.allclose(call(fast, x), call(small, x), rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_gradients_for_statistics_pass_quantized_layers() -> None:
    batches = [torch.randn(16, 6, 9, 9, generator=torch.Generator().manual_seed(2))]
    plain = network(CONVS["2-D"][0]())
    expected = fxfact.calibrate(plain, batches).moments["0.2"].output.factors[0]
    for name in ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"):
        model = copy.deepcopy(plain)
        torchao(name)(model)
        found = fxfact.calibrate(model, batches).moments["0.2"].output.factors[0]
        assert (found - expected).norm() < 0.1 * expected.norm()
        program = torch.export.export(model, (batches[0],))
        if "Dynamic" in name:
            with pytest.raises(CalibrationError, match=r"quantizes activations.*before it is quantized"):
                fxfact.calibrate(program, batches)
        else:
            found = fxfact.calibrate(program, batches).moments["0.2"].output.factors[0]
            assert (found - expected).norm() < 0.1 * expected.norm()


def test_classes_without_gradients_or_operators_are_named_with_a_way_out(tmp_path: Path) -> None:
    x = torch.randn(4, 6, 9, 9, generator=torch.Generator().manual_seed(2))
    model = network(CONVS["2-D"][0]())
    statistics = fxfact.calibrate(model, [x])
    scaled(NoGradient)(model)
    with pytest.raises(CalibrationError, match=r"because 4.weight is a NoGradient.*Calibrate the network before"):
        fxfact.plan(model, budget=fxfact.Macs(0.5), calibration=[x])
    assert fxfact.plan(model, budget=fxfact.Macs(0.5), calibration=statistics, example_inputs=x).rewrites
    scaled(Opaque)(model := network(CONVS["2-D"][0]()))
    small = fxfact.factorize(model, rank=0.5, example_inputs=x, verify=True)
    with pytest.raises(CaptureError, match=r"4.weight: tensors of the class Opaque cannot be compared.*_flatten__"):
        fxfact.verify(model, small, x)
    with pytest.raises(FileError, match=r"4.weight is a Opaque.*add_safe_globals for .*test_tensor_subclasses.Opaque"):
        fxfact.save(small, tmp_path / "small.pt")
    assert not (tmp_path / "small.pt").exists()


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_files_with_unknown_tensor_classes_are_refused_when_written_and_when_read(tmp_path: Path) -> None:
    model, source, x, _ = prepared("own, export, transposed")
    networks = {"small.pt": fxfact.factorize(model, rank=0.5, example_inputs=x), "small.pt2": fxfact.factorize(source)}
    for name, small in networks.items():
        path, given = tmp_path / name, [model] if name == "small.pt" else []
        fxfact.save(small, path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch._weights_only_unpickler, "_get_user_allowed_globals", dict)
            patch.setattr(torch._weights_only_unpickler, "_marked_safe_globals_set", set(), raising=False)
            with pytest.raises(FileError, match=r"4.weight is a Scaled.*add_safe_globals for"):
                fxfact.save(small, tmp_path / f"other_{name}")
            with pytest.raises(FileError, match=r"It holds .*\.Scaled\. If these are tensor classes that you trust"):
                fxfact.load(path, *given)
        assert call(fxfact.load(path, *given), x).equal(call(small, x))


def test_saved_weights_keep_their_class_in_whatever_model_they_are_loaded(tmp_path: Path) -> None:
    plain, x = network(CONVS["2-D"][0]()), torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(2))
    quantized = copy.deepcopy(plain)
    scaled(Scaled)(quantized)
    for saved, given in ((quantized, plain), (plain, quantized), (quantized, copy.deepcopy(plain).to("meta"))):
        small = fxfact.factorize(saved, rank=0.5, example_inputs=x)
        fxfact.save(small, tmp_path / "small.pt")
        loaded = fxfact.load(tmp_path / "small.pt", given)
        assert call(loaded, x).equal(call(small, x))
        assert type(loaded.get_submodule("4").weight.data) is type(small.get_submodule("4").weight.data)


def test_copies_share_or_own_the_memory_inside_wrappers() -> None:
    model = network(CONVS["2-D"][0]())
    scaled(Scaled)(model)
    weight = model[4].weight
    twin, same = alias_copy(model)[4].weight, copy_structure(model)[4].weight
    assert same is weight
    assert twin is not weight
    assert twin.values is not weight.values
    assert twin.values.data_ptr() == weight.values.data_ptr()
    assert copy.deepcopy(model)[4].weight.values.data_ptr() != weight.values.data_ptr()


class WritesInside(nn.Module):
    """A forward that changes the tensor inside a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(6, 16, 3), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.head.weight.detach().values.add_(1)
        return self.head(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("capture", ["trace", "modules"])
def test_forward_that_writes_inside_a_wrapper_is_refused(capture: Any) -> None:
    model = WritesInside().eval()
    scaled(Scaled)(model)
    before = model.head.weight.values.clone()
    with pytest.raises(CaptureError, match=r"head.weight"):
        fxfact.factorize(model, rank=0.5, example_inputs=torch.randn(1, 6, 9, 9), capture=capture)
    assert model.head.weight.values.equal(before)


class HoldsNested(nn.Module):
    """A network with a nested tensor as a parameter."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        parts = [torch.ones(2, 3), torch.ones(4, 3)]
        self.conv, self.nested = nn.Conv2d(6, 16, 3), nn.Parameter(torch.nested.nested_tensor(parts, layout=layout))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("capture", ["trace", "modules"])
def test_nested_parameters_are_kept(layout: torch.layout, capture: Any, tmp_path: Path) -> None:
    model, x = HoldsNested(layout).eval(), torch.randn(2, 6, 9, 9)
    small = fxfact.factorize(model, rank=0.5, example_inputs=x, capture=capture, verify=True)
    assert fxfact.verify(model, small, x).changed == ()
    fxfact.refit(small, model, [x, -x])
    fxfact.save(small, tmp_path / "small.pt")
    loaded = fxfact.load(tmp_path / "small.pt", HoldsNested(layout).eval())
    assert call(loaded, x).equal(call(small, x))
    if capture == "modules":
        assert [part.shape for part in loaded.nested.unbind()] == [(2, 3), (4, 3)]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("place", ["0.0", "4"])
def test_parameters_of_several_processes_are_refused(mesh: Any, place: str, tmp_path: Path) -> None:
    tensors = pytest.importorskip("torch.distributed.tensor")
    x = torch.randn(2, 6, 9, 9)
    model = network(CONVS["2-D"][0]())
    small = fxfact.factorize(model, rank=0.5, example_inputs=x, include="0.2")
    for owner in (model, small):
        layer = owner.get_submodule(place)
        layer.weight = nn.Parameter(tensors.distribute_tensor(layer.weight.detach(), mesh, [tensors.Shard(0)]))
    for do in (
        lambda: fxfact.factorize(model, rank=0.5, example_inputs=x),
        lambda: fxfact.plan(model, capture="modules"),
        lambda: fxfact.calibrate(model, [x]),
    ):
        with pytest.raises(CaptureError, match=rf"^{place}.weight: the parameter is a DTensor.*before.*unsharded"):
            do()
    with pytest.raises(FileError, match=rf"state dict's {place}.weight is a DTensor.*unsharded state"):
        fxfact.save(small, tmp_path / "small.pt")


def test_a_convolution_with_such_a_weight_stays_dense() -> None:
    x = torch.randn(2, 6, 9, 9)
    model = network(CONVS["2-D"][0]())

    class ForConvolutions(Scaled):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "conv" in func._schema.name:
                args, kwargs = tree_map_only(Opaque, lambda tensor: tensor.values * tensor.scale, (args, kwargs or {}))
                return func(*args, **kwargs)
            return super().__torch_dispatch__(func, types, args, kwargs)

    layer = model[0][2]
    layer.weight = nn.Parameter(
        ForConvolutions((layer.weight.detach() * 100).to(torch.int8), torch.tensor(0.01)), requires_grad=False
    )
    for capture in ("trace", "modules"):
        plan = fxfact.plan(model, rank=0.5, example_inputs=x, capture=capture)
        assert [decision.path for decision in plan.rewrites] == ["0.0"]
        assert "ForConvolutions" in plan["0.2"].reason


class RoundsInputs(nn.Module):
    """A layer that rounds its input to 5 bits, as layers with dynamic quantization do."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(1, keepdim=True) / 15.5  # the largest value is halfway between two steps
        return (x / step).round() * step


def test_rounded_activations_are_no_wrong_graph_and_hide_none() -> None:
    model = network(CONVS["2-D"][0]())
    model[4] = nn.Sequential(RoundsInputs(), model[4])
    errors = []
    for seed in range(4):
        x = torch.randn(64, 6, 9, 9, generator=torch.Generator().manual_seed(seed))
        small = fxfact.factorize(model, rank=0.5, example_inputs=x, verify=True)
        verified = fxfact.verify(model, small, x)
        assert verified.ok
        errors.append(verified.graph)
    assert max(errors) > 1e-4, "the tolerance without rounded activations"
    small.get_submodule("4.1").register_forward_hook(lambda module, args, output: 1.05 * output)
    assert not fxfact.verify(model, small, x).ok
