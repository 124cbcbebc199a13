"""What the commands inspect, plan, compress, verify, bench and report compute."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxfact
from fxfact.cli import main
from tests.support import EqualLayers

RunJson = Callable[..., Any]
SHAPE = ["--input", "2,3,10,10"]


def test_program_is_inspected_compressed_verified_reported_and_timed(
    workspace: Path, capsys: pytest.CaptureFixture[str], run_json: RunJson
) -> None:
    rows = run_json("inspect", "net.pt2")["convolutions"]
    assert [row["parameters"] for row in rows] == [448, 3480, 100]
    done = run_json(
        "compress", "net.pt2", "-o", "small.pt2", "--macs", "0.5", "--calibration", "data.npy", "--batch", "8"
    )
    assert done["after"]["macs"] <= 0.5 * done["before"]["macs"]
    assert done["predicted_loss_increase"] > 0
    assert done["measured_loss_increase"] > 0
    verified = run_json("verify", "net.pt2", "small.pt2")
    assert verified["ok"]
    assert 0 < verified["end_to_end"] < 1
    assert verified["within_tolerance"] is None
    assert not run_json("verify", "net.pt2", "small.pt2", "--tolerance", "1e-9", status=3)["within_tolerance"]
    reported = run_json("report", "net.pt2", "small.pt2", "-o", "report.html")
    assert reported["end_to_end_error"] == pytest.approx(verified["end_to_end"])
    assert "<svg" in Path("report.html").read_text(encoding="utf-8")
    timed = run_json("bench", "net.pt2", "small.pt2", "--repeats", "3", "--number", "2")
    assert timed["networks"][0]["parameters"] > timed["networks"][1]["parameters"] == done["after"]["parameters"]
    assert timed["speedup"] > 0
    script = "import torch; print(torch.export.load('small.pt2').module()(torch.randn(7, 3, 10, 10)).shape)"
    alone = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=workspace)
    assert alone.stdout.strip() == "torch.Size([7, 4])"
    assert main(["inspect", "small.pt2"]) == 0
    assert "Conv2d(3→16, 3×3)" in capsys.readouterr().out


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_every_command_fits_the_terminal(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["compress", "net.pt2", "-o", "small.pt2", "--rank", "0.5", "--factorization", "tucker,svd"]) == 0
    both = ["net.pt2", "small.pt2"]
    commands = [["inspect", "small.pt2"], ["verify", *both], ["report", *both], ["plan", "net.pt2", "--macs", "0.6"]]
    for arguments in (*commands, ["bench", *both, "--repeats", "1", "--number", "1"]):
        assert main(arguments) == 0
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) > 3
        assert max(map(len, printed)) <= int(columns), arguments


def test_program_with_keyword_inputs_is_compressed(workspace: Path, run_json: RunJson) -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 16, 3)

        def forward(self, *, pixels: torch.Tensor) -> torch.Tensor:
            return self.conv(pixels)

    torch.export.save(torch.export.export(Named().eval(), (), {"pixels": torch.randn(1, 8, 9, 9)}), "named.pt2")
    assert run_json("compress", "named.pt2", "-o", "small.pt2", "--rank", "0.5")["rewritten"] == 1
    assert run_json("verify", "named.pt2", "small.pt2")["ok"]
    assert run_json("bench", "named.pt2", "small.pt2", "--repeats", "3")["speedup"] > 0
    assert run_json("report", "named.pt2", "small.pt2")["ok"]


def test_module_becomes_a_program_or_weights(
    workspace: Path, capsys: pytest.CaptureFixture[str], run_json: RunJson
) -> None:
    run_json("compress", "shop:small", "-o", "small.pt2", "--rank", "0.5", *SHAPE, "--dynamic-batch")
    assert run_json("verify", "shop:small", "small.pt2", *SHAPE)["ok"]
    assert fxfact.load("small.pt2").module()(torch.randn(5, 3, 10, 10)).shape == (5, 4)
    run_json("compress", "shop:small", "-o", "small.pt", "--rank", "0.5", "--weights", "state.pt", *SHAPE)
    import shop  # noqa: PLC0415

    x = torch.randn(2, 3, 10, 10)
    expected = fxfact.factorize(shop.small(), rank=0.5, example_inputs=x)(x)
    assert torch.allclose(fxfact.load("small.pt", shop.small())(x), expected, atol=1e-5)
    assert main(["verify", "shop:small", "net.pt2", *SHAPE]) == 1  # net.pt2 was not made by fxfact
    assert "--tolerance" in capsys.readouterr().err
    assert not run_json("verify", "shop:small", "net.pt2", *SHAPE, "--tolerance", "1e-4")["graph"]


def test_likelihood_and_include_change_the_plan(workspace: Path, run_json: RunJson) -> None:
    data = ["--macs", "0.6", "--calibration", "data.npy"]
    plans = {
        likelihood: run_json("plan", "net.pt2", *data, "--likelihood", likelihood, "--include", "2")["plan"]
        for likelihood in ("categorical", "gaussian")
    }
    for plan in plans.values():
        assert ["factorization" not in each for each in plan["decisions"]] == [True, False, True]
    assert len({plan["decisions"][1]["predicted_loss_increase"] for plan in plans.values()}) == 2


@pytest.mark.parametrize(("kinds", "rewritten"), [("linear", [6]), ("conv", [0, 2]), ("conv,linear", [0, 2, 6])])
def test_kinds_of_layers_can_be_chosen(workspace: Path, run_json: RunJson, kinds: str, rewritten: list[int]) -> None:
    arguments = ["--rank", "0.5", "--factorization", "tucker,svd", "--kinds", kinds]
    plan = run_json("plan", "net.pt2", *arguments)["plan"]
    assert [each["path"] for each in plan["decisions"] if "factorization" in each] == list(map(str, rewritten))


def test_layers_may_share_parameters(workspace: Path, run_json: RunJson, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.zeros(2, 4, 10, 10)
    torch.export.save(torch.export.export(EqualLayers().eval(), (x,)), "equal.pt2")
    arguments = ["--rank", "3", "--factorization", "tucker,svd", "--joint", "convs.*", "--joint", "heads.?"]
    plan = run_json("plan", "equal.pt2", *arguments)["plan"]
    shared = {each["path"]: each.get("shares_with") for each in plan["decisions"]}
    assert {*shared.items()} >= {("convs.2", "convs.0"), ("heads.1", "heads.0"), ("stem", None)}
    assert plan["call"]["joint"] == ["convs.*", "heads.?"]
    assert main(["plan", "equal.pt2", "--rank", "3", "--joint", "[sc]*"]) == 1
    assert "--joint: '[sc]*' fits stem with a weight (8, 4, 3, 3)" in capsys.readouterr().err
    assert main(["plan", "equal.pt2", "--latency", "0.5", "--joint", "convs.*"]) == 1
    assert "Pass a budget of parameters, such as --params 0.5, or remove --joint." in capsys.readouterr().err


def test_kinds_that_do_not_exist_are_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "net.pt2", "--rank", "0.5", "--kinds", "dense"]) == 1
    assert "kinds must be 'conv', 'linear' or a list of these, got 'dense'" in capsys.readouterr().err


def test_max_samples_limits_the_data(workspace: Path, capsys: pytest.CaptureFixture[str], run_json: RunJson) -> None:
    data = ["--calibration", "data.npy", "--batch", "8", "--keep-statistics", "kept.npz"]
    run_json("plan", "net.pt2", "--rank", "0.5", *data, "--max-samples", "19")
    assert fxfact.Statistics.load("kept.npz").samples == 19
    run_json("plan", "net.pt2", "--macs", "0.6", *data, "--max-samples", "999")
    assert fxfact.Statistics.load("kept.npz").samples == 48
    np.savez("data.npz", input=np.load("data.npy"), labels=np.zeros(48))
    data = ["--calibration", "data.npz", "--batch", "8", "--keep-statistics", "kept.npz"]
    run_json("plan", "shop:small", "--rank", "0.5", *data, "--max-samples", "19")
    assert fxfact.Statistics.load("kept.npz").samples == 19
    assert main(["plan", "net.pt2", "--rank", "0.5", "--max-samples", "19"]) == 1
    assert "--max-samples is only used with data" in capsys.readouterr().err


def test_compress_warns_if_it_rewrites_nothing(workspace: Path, run_json: RunJson) -> None:
    with pytest.warns(UserWarning, match=r"factorize rewrote none of the 3 layers of .*: 3× excluded"):
        assert run_json("compress", "net.pt2", "-o", "same.pt2", "--rank", "0.5", "--exclude", "*")["rewritten"] == 0
    assert run_json("plan", "net.pt2", "--exclude", "*", "-o", "plan.json")["rewritten"] == 0
    with pytest.warns(UserWarning, match="apply rewrote none of the 3 layers"):
        run_json("compress", "net.pt2", "-o", "same.pt2", "--plan", "plan.json")


def test_fold_weights_reaches_computed_weights(workspace: Path, run_json: RunJson) -> None:
    assert run_json("plan", "shop:normed", *SHAPE)["rewritten"] == 0
    assert run_json("plan", "shop:normed", *SHAPE, "--fold-weights")["rewritten"] == 1


def test_verify_compares_outputs_of_networks_without_a_plan(workspace: Path, run_json: RunJson) -> None:
    weights = ["--other-weights", "zero.pt", "--tolerance", "0.5"]
    other = run_json("verify", "shop:small", "shop:small", *weights, *SHAPE, status=3)
    assert other["end_to_end"] == pytest.approx(1.0)
    shapes = run_json("verify", "shop:small", "shop:normed", "--tolerance", "0.5", *SHAPE, status=3)
    assert shapes == {"graph": None, "end_to_end": None, "ok": None, "within_tolerance": False}


def test_verify_speaks_of_closeness_only_with_a_tolerance(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "net.pt2", "-o", "small.pt2", "--rank", "0.3"]) == 0
    said = {}
    for tolerance, status in ((None, 0), ("2", 0), ("1e-6", 3)):
        capsys.readouterr()
        assert (
            main(["verify", "net.pt2", "small.pt2", *([] if tolerance is None else ["--tolerance", tolerance])])
            == status
        )
        said[tolerance] = capsys.readouterr().out
    assert "--tolerance" not in said[None]
    assert said["2"] == f"{said[None]}the outputs differ by no more than --tolerance 2\n"
    assert said["1e-6"] == f"{said[None]}the outputs differ by MORE than --tolerance 1e-06\n"
    assert "approximation error " in said[None]


def test_verify_refuses_a_network_made_from_another_original(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    torch.export.save(torch.export.export(other, (torch.randn(2, 3, 10, 10),)), "other.pt2")
    assert main(["compress", "net.pt2", "-o", "small.pt2", "--rank", "0.5"]) == 0
    assert main(["verify", "other.pt2", "small.pt2", "--tolerance", "2"]) == 1
    assert "has no plan of fxfact" not in capsys.readouterr().out


def test_threads_and_progress_are_used(
    workspace: Path, capsys: pytest.CaptureFixture[str], run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    run_json("bench", "net.pt2", "net.pt2", "--repeats", "1", "--number", "1", "--threads", "1")
    assert threads == [1]
    assert main(["plan", "net.pt2", "--macs", "0.6", "--calibration", "data.npy", "--progress"]) == 0
    phases = [line.split()[0] for line in capsys.readouterr().err.splitlines() if " took " in line]
    assert list(dict.fromkeys(phases)) == ["capturing", "calibrating", "planning", "measuring", "decomposing"]


def test_pareto_front_is_plotted_or_refused_at_once(
    workspace: Path, capsys: pytest.CaptureFixture[str], run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    run_json("plan", "net.pt2", "--macs", "0.6", "--plot", "front.svg", "-o", "plan.json")
    run_json("compress", "net.pt2", "-o", "small.pt2", "--plan", "plan.json", "--plot", "front.png")
    assert min(Path(name).stat().st_size for name in ("front.svg", "front.png")) > 5000
    assert main(["plan", "net.pt2", "--rank", "0.5", "--plot", "other.png"]) == 1
    assert "--rank is no budget" in capsys.readouterr().err
    assert main(["plan", "absent.pt2", "--macs", "0.6", "--plot", "other.html"]) == 1
    assert "a picture is written to NAME.png" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert main(["plan", "absent.pt2", "--macs", "0.6", "--plot", "other.png"]) == 1
    assert "pip install 'fxfact[plot]'" in capsys.readouterr().err


def test_dynamic_batch_is_exported_from_a_single_sample(workspace: Path, run_json: RunJson) -> None:
    run_json("compress", "shop:small", "-o", "s.pt2", "--rank", "0.5", "--input", "1,3,10,10", "--dynamic-batch")
    assert torch.export.load("s.pt2").module()(torch.randn(5, 3, 10, 10)).shape == (5, 4)


def test_plan_is_made_kept_and_applied(workspace: Path, capsys: pytest.CaptureFixture[str], run_json: RunJson) -> None:
    data = ["--calibration", "data.npy", "--batch", "8", "--macs", "0.6", "--factorization", "tucker,channel_svd"]
    run_json("plan", "net.pt2", *data, "-o", "plan.json", "--keep-statistics", "kept.npz")
    plan = fxfact.Plan.load("plan.json")
    run_json("plan", "net.pt2", *data, "--workers", "2", "-o", "shared.json")
    assert [decision.rewrite for decision in fxfact.Plan.load("shared.json")] == [decision.rewrite for decision in plan]
    assert {d.factorization.name for d in plan.rewrites if d.factorization} <= {"tucker", "channel_svd"}
    done = run_json("compress", "net.pt2", "-o", "small.pt2", "--plan", "plan.json", "--statistics", "kept.npz")
    assert done["after"]["macs"] == plan.after.macs
    run_json("plan", "net.pt2", "--params", "0.5", "--statistics", "kept.npz", "--multiple-of", "2")
    assert main(["plan", "net.pt2", "--rank", "0.5", "--exclude", "0"]) == 0
    assert "excluded" in capsys.readouterr().out
    assert run_json("plan", "net.pt2", "--rank", "0.5", "--calibration", "data.npy")["plan"]["uses_statistics"]
    bound = run_json("plan", "net.pt2", "--loss", "1e-4", "--calibration", "data.npy", "--batch", "24")
    assert 0 <= bound["measured_loss_increase"] <= 1e-4


def test_error_curves_are_reused_by_later_plans(
    workspace: Path, run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--factorization", "tucker", "--error-curves", "curves.json"]
    kept = ["--calibration", "data.npy", "--keep-statistics", "kept.npz"]
    run_json("plan", "net.pt2", *data, "--macs", "0.5", *kept)
    before = Path("curves.json").read_bytes()
    assert len(fxfact.ErrorCurveCache.load("curves.json")) == 2
    monkeypatch.setattr("fxfact.planning.allocation.error_curves", lambda *args: pytest.fail("a curve was computed"))
    found = run_json("plan", "net.pt2", *data, "--macs", "0.6", "--statistics", "kept.npz")
    assert found["after"]["macs"] <= 0.6 * found["before"]["macs"]
    run_json("compress", "net.pt2", "-o", "s.pt2", *data, "--macs", "0.7", "--statistics", "kept.npz")
    assert Path("curves.json").read_bytes() == before


@pytest.mark.parametrize("budget", [fxfact.Macs(0.5), fxfact.Loss(1e-4), None], ids=str)
def test_compress_writes_what_factorize_returns(workspace: Path, run_json: RunJson, budget: Any) -> None:
    size = {"Macs": ["--macs", "0.5"], "Loss": ["--loss", "1e-4"]}.get(type(budget).__name__, ["--rank", "0.4"])
    data = ["--factorization", "tucker", "--calibration", "data.npy", "--batch", "8"]
    done = run_json("compress", "net.pt2", "-o", "small.pt2", *size, *data)
    batches = torch.from_numpy(np.load("data.npy")).split(8)
    options: dict[str, Any] = {"rank": 0.4} if budget is None else {"budget": budget}
    expected = fxfact.factorize(fxfact.load("net.pt2"), "tucker", calibration=batches, **options)
    assert done["measured_loss_increase"] == fxfact.plan_of(expected).measured_loss_increase
    run_json("plan", "net.pt2", *size, *data, "-o", "plan.json")
    run_json("compress", "net.pt2", "-o", "again.pt2", "--plan", "plan.json", *data[2:])
    for file in ("small.pt2", "again.pt2"):
        found = fxfact.load(file).state_dict
        assert found.keys() == expected.state_dict.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.state_dict.items())


def test_calibration_beside_statistics_measures_the_plan(
    workspace: Path, capsys: pytest.CaptureFixture[str], run_json: RunJson
) -> None:
    options = ["--factorization", "tucker", "--batch", "8"]
    kept = ["--calibration", "data.npy", "--keep-statistics", "kept.npz"]
    run_json("plan", "net.pt2", *options, "--macs", "0.5", *kept)
    batches = torch.from_numpy(np.load("data.npy")).flip(-1)
    np.save("other.npy", batches.numpy())
    beside = [*options, "--statistics", "kept.npz", "--calibration", "other.npy"]
    statistics = fxfact.Statistics.load("kept.npz")
    for option, budget in (("--macs", fxfact.Macs(0.5)), ("--loss", fxfact.Loss(0.5))):
        found = run_json("plan", "net.pt2", option, "0.5", *beside)["measured_loss_increase"]
        data: dict[str, Any] = {"calibration": statistics, "held_out": batches.split(8)}
        assert found == fxfact.plan(fxfact.load("net.pt2"), "tucker", budget=budget, **data).measured_loss_increase > 0
    assert main(["plan", "net.pt2", "--rank", "0.5", *beside]) == 1
    assert "only measures a plan for a budget" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data.npy", "named.npz"])
def test_compress_exports_a_module_on_the_first_sample_of_the_data(
    name: str, workspace: Path, run_json: Callable[..., Any]
) -> None:
    x = np.load("data.npy")
    np.savez("named.npz", input=x)
    run_json("compress", "shop:small", "-o", "small.pt2", "--macs", "0.6", "--calibration", name)
    assert fxfact.load("small.pt2").module()(torch.from_numpy(x[:1])).shape == (1, 4)


@pytest.mark.parametrize("model", ["net.pt2", "shop:small"])
def test_written_program_does_not_hold_the_data(model: str, workspace: Path, run_json: RunJson) -> None:
    program, images = fxfact.load("net.pt2"), torch.zeros(4000, 3, 10, 10)
    program.example_inputs = ((images[:2],), {})
    fxfact.save(program, "net.pt2")
    np.save("data.npy", images.numpy() + np.load("data.npy")[:1])
    run_json("compress", model, "-o", "small.pt2", "--rank", "0.5", "--calibration", "data.npy", "--max-samples", "8")
    assert Path("small.pt2").stat().st_size < images.numel()


@pytest.mark.integration
def test_network_for_a_latency_budget_is_written(
    workspace: Path, run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXFACT_CACHE", "times")
    shape = ["--input", "4,3,10,10", "--factorization", "channel_svd"]
    run_json("compress", "shop:small", "-o", "small.pt", "--latency", "0.99", *shape)
    import shop  # noqa: PLC0415

    small = fxfact.load("small.pt", shop.small())
    assert fxfact.plan_of(small).network.ms  # the time of the dense network in its fastest form
    assert fxfact.verify(shop.small(), small, torch.randn(4, 3, 10, 10)).ok


def test_amount_is_a_budget(workspace: Path, run_json: RunJson) -> None:
    for option, amount, unit in (("--macs", "100k", "macs"), ("--params", "2500", "parameters")):
        after = run_json("plan", "net.pt2", option, amount)["after"]
        assert after[unit] <= {"macs": 100_000, "parameters": 2500}[unit]


def test_metric_of_the_user_is_a_budget(workspace: Path, run_json: RunJson) -> None:
    data = ["--calibration", "data.npy", "--factorization", "channel_svd"]
    score = run_json("plan", "net.pt2", "--metric", "shop:score", "--at-most-drop", "1e-4", *data)["plan"]
    assert score["measured_points"][0]["metric"] == pytest.approx(0, abs=1e-9)
    assert len(score["measured_points"]) > 2
    done = run_json(
        *("compress", "net.pt2", "-o", "small.pt2", "--metric", "shop:error", "--at-most-drop", "1e-4"),
        *("--lower-is-better", "--minimise", "params", *data),
    )
    assert done["after"]["parameters"] < done["before"]["parameters"]


def test_plan_with_data_carries_on_alone(
    workspace: Path, capsys: pytest.CaptureFixture[str], run_json: RunJson
) -> None:
    data = ["--macs", "0.5", "--factorization", "tucker", "--calibration", "data.npy", "--batch", "8"]
    run_json("compress", "net.pt2", "-o", "small.pt2", *data)
    plain = run_json("plan", "net.pt2", *data)["plan"]
    assert main(["plan", "net.pt2", "-o", "plan.json", *data]) == 0
    assert "wrote plan.json and plan.statistics.npz" in capsys.readouterr().out
    kept = fxfact.Plan.load("plan.json")
    assert kept == fxfact.Plan.from_json(plain)
    run_json("compress", "net.pt2", "-o", "again.pt2", "--plan", "plan.json")
    one, other = (fxfact.load(file).state_dict for file in ("small.pt2", "again.pt2"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    Path("plan.statistics.npz").unlink()
    assert main(["compress", "net.pt2", "-o", "again.pt2", "--plan", "plan.json"]) == 1
    said = capsys.readouterr().err
    assert "plan.json was made with data, and plan.statistics.npz" in said
    assert "--calibration DATA, or the statistics, --statistics FILE" in said
    assert main(["plan", "net.pt2", "-o", "plain.json", "--macs", "0.5", "--factorization", "tucker"]) == 0
    assert not Path("plain.statistics.npz").exists()


@pytest.mark.parametrize("model", [["net.pt2"], ["shop:small", *SHAPE, "--dynamic-batch"]], ids=["program", "module"])
def test_onnx_file_computes_what_the_network_computes(workspace: Path, run_json: RunJson, model: list[str]) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    options = ["--macs", "0.5", "--factorization", "channel_svd"]
    run_json("compress", *model, *options, "-o", "small.onnx")
    run_json("compress", *model, *options, "-o", "small.pt2")
    session, x = runtime.InferenceSession("small.onnx"), torch.randn(5, 3, 10, 10)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(found - fxfact.load("small.pt2").module()(x).detach().numpy()).max() < 1e-4


def test_onnx_file_needs_its_packages(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_onnxscript(*arguments: Any, **options: Any) -> Any:
        raise ModuleNotFoundError("No module named 'onnxscript'")

    monkeypatch.setattr(torch.onnx, "export", without_onnxscript)
    assert main(["compress", "net.pt2", "-o", "small.onnx", "--rank", "0.5"]) == 1
    assert "pip install onnx onnxscript" in capsys.readouterr().err
    assert not Path("small.onnx").exists()


def test_arrays_of_one_file_are_the_arguments_by_name(workspace: Path, run_json: RunJson) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 16, 3)

        def forward(self, *, pixels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.conv(pixels) * scale

    x = {"pixels": torch.randn(16, 8, 9, 9), "scale": torch.rand(16, 1, 1, 1)}
    batch = torch.export.Dim("batch", max=64)
    example = {name: value[:2] for name, value in x.items()}
    shapes = {name: {0: batch} for name in x}
    torch.export.save(torch.export.export(Scaled().eval(), (), example, dynamic_shapes=shapes), "scaled.pt2")
    np.savez("x.npz", **{name: value.numpy() for name, value in x.items()})
    plan = run_json("plan", "scaled.pt2", "--rank", "0.5", "--calibration", "x.npz", "--batch", "4")["plan"]
    assert plan["uses_statistics"]
