"""Many kernels, on the caller's executors: the same result, shown, and cancelled cleanly."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.factorizations.cp import CPMobilenet
from tests.support import Branching, apart


def many() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in range(7)))


class Recording(ThreadPoolExecutor):
    """Begins when it has more than it may have workers, and remembers how many were on their way at the same time."""

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


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_any_executor_gives_the_same_network() -> None:
    model = many()
    random = {"factorization": CPMobilenet(init="random", sweeps=3), "rank": 4, "allow_growth": True}
    alone = fxfact.factorize(model, **random, generator=torch.Generator().manual_seed(3))
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        for executor in (threads, processes, Recording(2)):
            made = fxfact.factorize(
                model, **random, generator=torch.Generator().manual_seed(3), executor=executor, capture="modules"
            )
            assert same(alone, made)
    assert not same(alone, fxfact.factorize(model, **random, generator=torch.Generator().manual_seed(4)))


def test_random_beginnings_are_those_of_the_generator() -> None:
    model, x = many(), torch.randn(2, 6, 8, 8)
    plan = fxfact.plan(model, CPMobilenet(init="random"), rank=0.5)

    def made(seed: int) -> Tensor:
        found: Tensor = fxfact.apply(plan, model, generator=torch.Generator().manual_seed(seed))(x)
        return found

    assert made(1).equal(made(1))
    assert not made(1).equal(made(2))


def test_no_more_kernels_are_on_their_way_than_there_are_workers() -> None:
    recording = Recording(2)
    fxfact.factorize(many(), executor=recording)
    assert (recording.submitted, recording.most) == (7, 3)


def test_the_largest_kernels_come_first_and_go_where_they_belong() -> None:
    seen: list[int] = []

    class Noted(CPMobilenet):
        def _weights(self, block: Any, *args: Any) -> Any:
            seen.append(block.in_channels)
            return super()._weights(block, *args)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 6, 3)).eval()
    batches = torch.randn(16, 4, 9, 9).split(8)
    fxfact.plan(model, Noted(), budget=fxfact.Params(0.5), calibration=batches, likelihood="gaussian")
    assert list(dict.fromkeys(seen)) == [8, 12, 4]
    seen.clear()
    made = fxfact.factorize(model, Noted(), rank=0.7)
    assert seen == [8, 12, 4]
    x = torch.randn(1, 8, 9, 9)
    assert apart(model[1](x), made.get_submodule("1")(x)) < 0.8, "it is made of that kernel"


def test_progress_is_shown_as_tqdm_shows_it() -> None:
    seen: list[Any] = []

    def bar(iterable: Iterable[Any], *, total: int, desc: str) -> Iterable[Any]:
        seen.append((total, desc))
        for item in iterable:
            seen.append(len(seen))
            yield item

    for executor in (None, Recording(2)):
        seen.clear()
        fxfact.factorize(many(), progress=bar, executor=executor)
        assert seen == [(7, "decomposing"), 1, 2, 3, 4, 5, 6, 7]
    empty = fxfact.apply(fxfact.plan(many()), many(), weights="empty", progress=bar)
    assert isinstance(empty, nn.Module)


def test_plans_are_measured_on_an_executor_too_and_are_the_same(image: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(5)).eval()
    model(image)
    what: dict[str, Any] = {"budget": fxfact.Macs(0.6), "calibration": torch.randn(16, *image.shape[1:]).split(4)}
    what["held_out"] = torch.randn(4, *image.shape[1:]).split(4)
    recording, seen = Recording(2), list[str]()

    def bar(iterable: Iterable[Any], *, total: int | None, desc: str) -> Iterable[Any]:
        seen.append(desc)
        return iterable

    plain = fxfact.plan(model, "channel_svd", **what)
    assert fxfact.plan(model, "channel_svd", executor=recording, progress=bar, **what) == plain
    assert recording.submitted >= 2 + len(plain.rewrites) > 2  # errors of both convolutions, and what was measured
    assert {"planning", "measuring"} <= set(seen)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        assert fxfact.plan(model, "channel_svd", executor=processes, **what) == plain
    before = recording.submitted
    made = fxfact.factorize(model, "channel_svd", executor=recording, **what)
    assert recording.submitted > before
    torch.testing.assert_close(made(image), fxfact.factorize(model, "channel_svd", **what)(image))
    with pytest.raises(fxfact.FxfactError, match="must yield every item"):
        fxfact.plan(model, "channel_svd", progress=lambda results, **_: list(results)[:-1], **what)


def test_other_processes_get_copies_and_give_plain_tensors() -> None:
    model = many()
    with torch.no_grad():  # all in one storage
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    view, place = model[0].weight.detach().numpy(), model[0].weight.data_ptr()
    before = view.copy()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        made = fxfact.factorize(model, rank=0.5, executor=processes)
    assert same(made, fxfact.factorize(model, rank=0.5))
    assert model[0].weight.data_ptr() == place
    assert (view == before).all()
    assert not any(parameter.is_shared() for network in (model, made) for parameter in network.parameters())


def test_an_interrupt_cancels_what_has_not_begun_and_leaves_the_model_alone(image: Tensor) -> None:
    gate, begun = threading.Event(), []

    class Slow(CPMobilenet):
        def _weights(self, *args: Any) -> Any:
            begun.append(1)
            gate.wait(5)
            return super()._weights(*args)

    def interrupted(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
        iterator = iter(iterable)
        yield next(iterator)
        raise KeyboardInterrupt

    model = many()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gate.set()
    with ThreadPoolExecutor(1) as executor:
        futures: list[Future[Any]] = []
        submit = executor.submit
        executor.submit = lambda *args: futures.append(submit(*args)) or futures[-1]  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            fxfact.factorize(model, Slow(sweeps=1), progress=interrupted, executor=executor)
    assert len(futures) < 7
    assert all(future.done() for future in futures)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any("0." in name for name, _ in model.named_modules())


def test_a_failure_in_a_worker_names_the_place() -> None:
    model = many()
    model[3].weight.data[0, 0, 0, 0] = float("nan")
    with ThreadPoolExecutor(2) as executor, pytest.raises(fxfact.FxfactError, match=r"^3: the weight holds 1 NaN"):
        fxfact.factorize(model, executor=executor)


def test_modules_are_decomposed_on_executors_too(image: Tensor) -> None:
    model = Branching()
    with ThreadPoolExecutor(2) as executor:
        made = fxfact.factorize(model, example_inputs=image, executor=executor, verify=True)
    assert same(made, fxfact.factorize(model, example_inputs=image))


@pytest.mark.integration
def test_a_cluster_is_an_executor() -> None:
    distributed = pytest.importorskip("distributed", reason="pip install -e '.[cluster]'")
    model = many()
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        made = fxfact.factorize(model, executor=client.get_executor())
    assert same(made, fxfact.factorize(model))


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e30])
def test_errors_are_told_of_kernels_of_any_size(scale: float) -> None:
    model = many()
    with torch.no_grad():
        model[0].weight.mul_(scale)
    found = fxfact.inspect(fxfact.factorize(model, rank=0.5)).rows[0].relative_error
    assert found == pytest.approx(fxfact.inspect(fxfact.factorize(many(), rank=0.5)).rows[0].relative_error, rel=1e-3)


@pytest.mark.parametrize("method", ["tucker", "tt", "cp", "channel_svd"])
def test_large_numbers_in_half_precision_do_not_overflow(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False)).half().eval()
    with torch.no_grad():
        model[0].weight.fill_(6e4)
    x = torch.full((1, 8, 9, 9), 1e-3).half()
    small = fxfact.factorize(model, method, rank=0.9)
    assert all(parameter.isfinite().all() for parameter in small.parameters())
    torch.testing.assert_close(small.float()(x.float()), model.float()(x.float()), rtol=1e-2, atol=0)


def test_precisions_that_nothing_is_decomposed_in_stay_dense() -> None:
    plan = fxfact.plan(nn.Sequential(nn.Conv2d(8, 16, 3)).to(torch.float8_e4m3fn))
    assert "float8_e4m3fn, but only float16, bfloat16, float32" in plan["0"].reason
