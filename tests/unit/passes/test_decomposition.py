"""Kernels are decomposed in this process or on the caller's executor, with the same result."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from fxfact.conv import ConvSpec, Skip, compose_weights
from fxfact.errors import ArgumentError, ArgumentTypeError, PlanError
from fxfact.factorizations.cp import CPMobilenet
from fxfact.passes import DecomposeJob, DecomposeOptions, decompose_layer, decompose_sites
from fxfact.passes.decomposition import planned_chains
from tests.support import ALL, Branching, apart, by_name


def seven_convs() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in range(7)))


class Recording(ThreadPoolExecutor):
    """Records how many jobs are submitted, and how many at once. They wait until there are more than workers."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.submitted, self.most = 0, 0
        self.futures: list[Future[Any]] = []
        self.full = threading.Event()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(self._run, fn, *args, **kwargs)
        self.submitted += 1
        self.futures.append(future)
        self.most = max(self.most, sum(not future.done() for future in self.futures))
        if self.most > self._max_workers:
            self.full.set()
        return future

    def _run(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        self.full.wait(1)
        return fn(*args, **kwargs)


def have_equal_states(one: nn.Module, other: nn.Module) -> bool:
    return all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# Executors


def test_threads_decompose_to_the_same_network() -> None:
    model = seven_convs()
    random = {"factorization": CPMobilenet(init="random", sweeps=3), "rank": 4, "allow_growth": True}
    alone = fxfact.factorize(model, **random, generator=torch.Generator().manual_seed(3))
    with ThreadPoolExecutor(3) as threads:
        for executor in (threads, Recording(2)):
            made = fxfact.factorize(
                model, **random, generator=torch.Generator().manual_seed(3), executor=executor, capture="modules"
            )
            assert have_equal_states(alone, made)
    assert not have_equal_states(alone, fxfact.factorize(model, **random, generator=torch.Generator().manual_seed(4)))


def test_threads_decompose_the_modules_of_a_model_that_keeps_its_python(image: Tensor) -> None:
    model = Branching()
    with ThreadPoolExecutor(2) as executor:
        made = fxfact.factorize(model, example_inputs=image, executor=executor, verify=True)
    assert have_equal_states(made, fxfact.factorize(model, example_inputs=image))


def test_no_more_kernels_are_submitted_than_there_are_workers() -> None:
    recording = Recording(2)
    fxfact.factorize(seven_convs(), executor=recording)
    assert (recording.submitted, recording.most) == (7, 3)


def test_plans_are_measured_on_an_executor_with_the_same_result(image: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(5)).eval()
    model(image)
    asked: dict[str, Any] = {"budget": fxfact.Macs(0.6), "calibration": torch.randn(16, *image.shape[1:]).split(4)}
    asked["held_out"] = torch.randn(4, *image.shape[1:]).split(4)
    recording, labels = Recording(2), list[str]()

    def bar(iterable: Iterable[Any], *, total: int | None, desc: str) -> Iterable[Any]:
        labels.append(desc)
        return iterable

    plain = fxfact.plan(model, "channel_svd", **asked)
    assert fxfact.plan(model, "channel_svd", executor=recording, progress=bar, **asked) == plain
    assert recording.submitted >= 2 + len(plain.rewrites) > 2  # the curves of both convolutions, and measured kernels
    assert {"planning", "measuring"} <= set(labels)
    before = recording.submitted
    made = fxfact.factorize(model, "channel_svd", executor=recording, **asked)
    assert recording.submitted > before
    torch.testing.assert_close(made(image), fxfact.factorize(model, "channel_svd", **asked)(image))
    with pytest.raises(fxfact.FxfactError, match="progress must yield every item of its iterable"):
        fxfact.plan(model, "channel_svd", progress=lambda results, **_: list(results)[:-1], **asked)


def test_interrupt_cancels_jobs_that_have_not_begun_and_leaves_the_model_unchanged() -> None:
    def interrupted(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
        iterator = iter(iterable)
        yield next(iterator)
        raise KeyboardInterrupt

    model = seven_convs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ThreadPoolExecutor(1) as executor:
        futures: list[Future[Any]] = []
        submit = executor.submit
        executor.submit = lambda *args: futures.append(submit(*args)) or futures[-1]  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            fxfact.factorize(model, CPMobilenet(sweeps=1), progress=interrupted, executor=executor)
    assert len(futures) < 7
    assert all(future.done() for future in futures)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any("0." in name for name, _ in model.named_modules())


def test_failure_in_a_worker_names_the_convolution() -> None:
    model = seven_convs()
    model[3].weight.data[0, 0, 0, 0] = float("nan")
    with ThreadPoolExecutor(2) as executor, pytest.raises(fxfact.FxfactError, match=r"^3: the weight holds 1 NaN"):
        fxfact.factorize(model, executor=executor)


# Order, progress and random numbers


def test_largest_kernels_are_decomposed_first_and_results_keep_their_place() -> None:
    channels: list[int] = []

    class Noted(CPMobilenet):
        def _weights(self, block: Any, *args: Any) -> Any:
            channels.append(block.in_channels)
            return super()._weights(block, *args)

        def _weights_in_metric(self, kernel: Any, *args: Any, **options: Any) -> Any:
            channels.append(kernel.block.in_channels)
            return super()._weights_in_metric(kernel, *args, **options)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 6, 3)).eval()
    batches, noted = torch.randn(16, 4, 9, 9).split(8), Noted(sweeps=5)
    fxfact.plan(model, noted, budget=fxfact.Params(0.5), calibration=batches, likelihood="gaussian")
    assert list(dict.fromkeys(channels)) == [8, 12, 4]
    channels.clear()
    made = fxfact.factorize(model, noted, rank=0.7)
    assert channels == [8, 12, 4]
    x = torch.randn(1, 8, 9, 9)
    assert apart(model[1](x), made.get_submodule("1")(x)) < 0.8, "it approximates that kernel"


def test_progress_is_reported_in_the_way_of_tqdm() -> None:
    calls: list[Any] = []

    def bar(iterable: Iterable[Any], *, total: int, desc: str) -> Iterable[Any]:
        calls.append((total, desc))
        for item in iterable:
            calls.append(len(calls))
            yield item

    for executor in (None, Recording(2)):
        calls.clear()
        fxfact.factorize(seven_convs(), progress=bar, executor=executor)
        assert calls == [(1, "capturing"), 1, (7, "decomposing"), *range(3, 10)]
    empty = fxfact.apply(fxfact.plan(seven_convs()), seven_convs(), weights="empty", progress=bar)
    assert isinstance(empty, nn.Module)


def test_random_initial_factors_are_drawn_from_the_generator() -> None:
    model, x = seven_convs(), torch.randn(2, 6, 8, 8)
    plan = fxfact.plan(model, CPMobilenet(init="random", sweeps=5), rank=0.5)

    def made(seed: int) -> Tensor:
        found: Tensor = fxfact.apply(plan, model, generator=torch.Generator().manual_seed(seed))(x)
        return found

    assert made(1).equal(made(1))
    assert not made(1).equal(made(2))


def test_known_decompositions_are_used_and_do_not_change_the_random_numbers_of_others() -> None:
    model = seven_convs()
    plan = fxfact.plan(model, CPMobilenet(init="random", sweeps=2), rank=0.5)
    sites = {site.path: site for site in capture(model, None).sites}

    def weights(known: Any) -> list[list[Tensor]]:
        options = DecomposeOptions(generator=torch.Generator().manual_seed(0))
        chains = planned_chains(plan, sites, options, known=known)
        return [[stage.weight for stage in chain.stages] for chain in chains]

    alone = weights(None)
    first = decompose_layer(sites["0"].layer, plan["0"], 1, None)
    found = weights({plan["0"].rewrite: first})
    assert all(torch.equal(one, other) for one, other in zip(found[0], first.weights, strict=True))
    assert not torch.equal(found[0][0], alone[0][0])
    for one, other in zip(found[1:], alone[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Single decompositions


def test_decomposition_is_a_value_with_its_relative_error() -> None:
    model = seven_convs()
    plan = fxfact.plan(model, "channel_svd", rank=3)
    (site, *_) = capture(model, None).sites
    found = decompose_layer(site.layer, plan["0"], None, None)
    dense = site.weight.detach()
    expected = apart(dense, compose_weights(plan["0"].stages, found.weights))
    assert found.relative_error == pytest.approx(expected, rel=1e-4)
    (again,) = decompose_sites([DecomposeJob(site, plan["0"])], DecomposeOptions(), None, label="decomposing")
    assert all(torch.equal(a, b) for a, b in zip(found.weights, again.weights, strict=True))
    assert again.relative_error == found.relative_error


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e30])
def test_relative_error_does_not_depend_on_the_scale_of_the_kernel(scale: float) -> None:
    model = seven_convs()
    with torch.no_grad():
        model[0].weight.mul_(scale)
    found = fxfact.inspect(fxfact.factorize(model, rank=0.5, include="0")).rows[0].relative_error
    same = fxfact.inspect(fxfact.factorize(seven_convs(), rank=0.5, include="0")).rows[0].relative_error
    assert found == pytest.approx(same, rel=1e-3)


@pytest.mark.parametrize("method", ["tucker", "tt", "cp", "channel_svd"])
def test_large_numbers_in_half_precision_do_not_overflow(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False)).half().eval()
    with torch.no_grad():
        model[0].weight.fill_(6e4)
    x = torch.full((1, 8, 9, 9), 1e-3).half()
    small = fxfact.factorize(model, method, rank=0.9)
    assert all(parameter.isfinite().all() for parameter in small.parameters())
    torch.testing.assert_close(small.float()(x.float()), model.float()(x.float()), rtol=1e-2, atol=0)


def test_weights_of_types_that_cannot_be_decomposed_stay_dense() -> None:
    plan = fxfact.plan(nn.Sequential(nn.Conv2d(8, 16, 3)).to(torch.float8_e4m3fn))
    assert "float8_e4m3fn, but only float16, bfloat16, float32 and float64 can be decomposed" in plan["0"].reason


def test_decomposition_on_data_is_closer_at_the_output(classifier: nn.Module, color_images: Tensor) -> None:
    x = color_images * torch.logspace(0, -3, 3)[:, None, None]  # one channel of the input hardly matters
    plain, aware = (
        fxfact.factorize(classifier, "channel_svd", rank=0.4, calibration=calibration, example_inputs=x[:1])
        for calibration in (None, x.split(8))
    )
    expected = classifier(x)
    assert (aware(x) - expected).norm() < (plain(x) - expected).norm()


@pytest.mark.parametrize("factorization", ALL, ids=by_name)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_stages_fitted_to_data_have_the_strides_of_new_tensors(factorization: Any, order: int) -> None:
    """PyTorch chooses the memory format by the strides of the weight, also for 1×1 kernels."""
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[order - 1]
    model = nn.Sequential(kind(6, 8, 3), kind(8, 12, 3), nn.Flatten(), nn.Linear(12 * 2**order, 3)).eval()
    x = torch.randn(8, 6, *[6] * order, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"include": "1", "allow_growth": True}
    refused = isinstance(factorization.rejects(ConvSpec.parse(8, 12, (3,) * order)), Skip)
    small = fxfact.factorize(model, factorization, rank=0.6, calibration=[x], **options)
    assert bool(fxfact.plan_of(small).rewrites) != refused
    assert all(p.stride() == torch.empty(p.shape).stride() for p in small.parameters())


# What is refused


def test_options_are_checked() -> None:
    with pytest.raises(ArgumentError, match="weights must be 'decompose' or 'empty', got 'random'"):
        DecomposeOptions(weights="random")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="generator"):
        DecomposeOptions(generator=42)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"concurrent\.futures\.Executor"):
        DecomposeOptions(executor=2)  # type: ignore[arg-type]
    with pytest.raises(
        ArgumentTypeError, match="progress must be None, True, False or a callable like tqdm, got 'yes'"
    ):
        DecomposeOptions(progress="yes")  # type: ignore[arg-type]


def test_plan_made_with_data_needs_statistics_unless_weights_are_empty(
    classifier: nn.Module, color_images: Tensor
) -> None:
    plan = fxfact.plan(classifier, "channel_svd", rank=0.5, calibration=[color_images])
    sites = {site.path: site for site in capture(classifier, None).sites}
    with pytest.raises(PlanError, match=r"made with data\. Pass what fxfact\.calibrate returned as statistics="):
        next(planned_chains(plan, sites, DecomposeOptions()))
    chains = list(planned_chains(plan, sites, DecomposeOptions(weights="empty")))
    assert [chain.path for chain in chains] == [decision.path for decision in plan.rewrites]
    assert all(chain.relative_error is None for chain in chains)


def test_chain_of_one_stage_is_the_convolution(small: nn.Module, image: Tensor) -> None:
    plan = fxfact.plan(small, "tucker", rank=2, include="second", example_inputs=image).edited("second", rank=(12, 8))
    network = fxfact.apply(plan, small)
    assert len(plan["second"].stages) == 1
    torch.testing.assert_close(network(image), small(image), rtol=1e-4, atol=1e-5)
