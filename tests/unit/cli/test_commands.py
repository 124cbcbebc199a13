from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxfact
from fxfact.cli import main


def test_the_demo_shows_plan_diff_and_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the demo is an extra: pip install 'fxfact[demo]'")
    assert main(["demo", "--epochs", "1", "--factorization", "channel_svd", "--rank", "0.5"]) == 0
    shown = capsys.readouterr()
    for words in ("1348 images", "channel_svd", "5 of 6 rewritten", "before and after", "held-out accuracy", " ms"):
        assert words in shown.out
    assert "epoch 1 of 1" in shown.err


def test_an_error_of_ours_is_a_message_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo"]) == 1
    assert "pip install 'fxfact[demo]'" in capsys.readouterr().err
    assert main(["demo", "--rank", "0"]) == 1
    assert "positive" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--epochs", "0"], ["demo", "--rank", "much"]])
def test_wrong_arguments_exit_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: fxfact" in capsys.readouterr().err


def test_it_runs_as_a_module_and_as_a_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "fxfact", "demo", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "example: fxfact demo" in shown
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="fxfact")
    assert command.load() is main


_MODELS = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, 4)).eval()

def normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3)))

def nothing():
    return 3
"""


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of models, an exported one, and data."""
    (tmp_path / "shop.py").write_text(_MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import shop  # noqa: PLC0415

    model, x = shop.small(), torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", max=64)
    torch.export.save(torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},)), "net.pt2")
    torch.save(model.state_dict(), "state.pt")
    torch.save({name: torch.zeros_like(value) for name, value in model.state_dict().items()}, "zero.pt")
    np.save("data.npy", x.numpy())
    yield tmp_path
    sys.modules.pop("shop", None)


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_program_is_inspected_compressed_verified_and_timed(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = told(capsys, "inspect", "net.pt2")["convolutions"]
    assert [row["parameters"] for row in rows] == [448, 3480]
    done = told(
        capsys, "compress", "net.pt2", "-o", "small.pt2", "--macs", "0.5", "--calibration", "data.npy", "--batch", "8"
    )
    assert done["after"]["macs"] <= 0.5 * done["before"]["macs"]
    assert done["expected_loss_increase"] > 0
    assert done["measured_loss_increase"] is None
    verified = told(capsys, "verify", "net.pt2", "small.pt2")
    assert verified["ok"]
    assert 0 < verified["end_to_end"] < 1
    assert not told(capsys, "verify", "net.pt2", "small.pt2", "--tolerance", "1e-9", code=3)["near"]
    reported = told(capsys, "report", "net.pt2", "small.pt2", "-o", "report.html")
    assert reported["end_to_end_error"] == pytest.approx(verified["end_to_end"])
    assert "<svg" in Path("report.html").read_text(encoding="utf-8")
    timed = told(capsys, "bench", "net.pt2", "small.pt2", "--repeats", "3", "--number", "2")
    assert timed["networks"][0]["parameters"] > timed["networks"][1]["parameters"] == done["after"]["parameters"]
    assert timed["speedup"] > 0
    script = "import torch; print(torch.export.load('small.pt2').module()(torch.randn(7, 3, 10, 10)).shape)"
    alone = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=room)
    assert alone.stdout.strip() == "torch.Size([7, 4])"
    assert main(["inspect", "small.pt2"]) == 0
    assert "Conv2d(3→16, 3×3)" in capsys.readouterr().out


def test_a_program_may_take_its_inputs_by_name(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 16, 3)

        def forward(self, *, pixels: torch.Tensor) -> torch.Tensor:
            return self.conv(pixels)

    torch.export.save(torch.export.export(Named().eval(), (), {"pixels": torch.randn(1, 8, 9, 9)}), "named.pt2")
    assert told(capsys, "compress", "named.pt2", "-o", "small.pt2", "--rank", "0.5")["rewritten"] == 1
    assert told(capsys, "verify", "named.pt2", "small.pt2")["ok"]
    assert told(capsys, "bench", "named.pt2", "small.pt2", "--repeats", "3")["speedup"] > 0
    assert told(capsys, "report", "named.pt2", "small.pt2")["ok"]


def test_a_module_becomes_a_program_or_weights(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--input", "2,3,10,10"]
    told(capsys, "compress", "shop:small", "-o", "small.pt2", "--rank", "0.5", *shape, "--dynamic-batch")
    assert told(capsys, "verify", "shop:small", "small.pt2", *shape)["ok"]
    assert fxfact.load("small.pt2").module()(torch.randn(5, 3, 10, 10)).shape == (5, 4)
    told(capsys, "compress", "shop:small", "-o", "small.pt", "--rank", "0.5", "--weights", "state.pt", *shape)
    import shop  # noqa: PLC0415

    x = torch.randn(2, 3, 10, 10)
    expected = fxfact.factorize(shop.small(), rank=0.5, example_inputs=x)(x)
    assert torch.allclose(fxfact.load("small.pt", shop.small())(x), expected, atol=1e-5)
    assert main(["verify", "shop:small", "net.pt2", *shape]) == 1  # of what fxfact did not make
    assert "--tolerance" in capsys.readouterr().err
    assert not told(capsys, "verify", "shop:small", "net.pt2", *shape, "--tolerance", "1e-4")["graph"]


def test_what_is_said_is_heeded(
    room: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--macs", "0.6", "--calibration", "data.npy"]
    plans = {
        likelihood: told(capsys, "plan", "net.pt2", *data, "--likelihood", likelihood, "--include", "2")["plan"]
        for likelihood in ("categorical", "gaussian")
    }
    for plan in plans.values():
        assert [each["factorization"] is None for each in plan["decisions"]] == [True, False]
    assert len({plan["decisions"][1]["predicted_loss_increase"] for plan in plans.values()}) == 2
    shape = ["--input", "2,3,10,10"]
    assert told(capsys, "plan", "shop:normed", *shape)["rewritten"] == 0
    assert told(capsys, "plan", "shop:normed", *shape, "--fold-weights")["rewritten"] == 1
    other = told(capsys, "verify", "shop:small", "shop:small", "--other-weights", "zero.pt", *shape,
                 "--tolerance", "0.5", code=3)  # fmt: skip
    assert other["end_to_end"] == pytest.approx(1.0)
    shapes = ["verify", "shop:small", "shop:normed", "--tolerance", "0.5", *shape]
    assert told(capsys, *shapes, code=3) == {"graph": None, "end_to_end": None, "ok": None, "near": False}
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    told(capsys, "bench", "net.pt2", "net.pt2", "--repeats", "1", "--number", "1", "--threads", "1")
    assert threads == [1]
    assert main(["plan", "net.pt2", *data, "--progress"]) == 0
    assert "100%" in capsys.readouterr().err


def test_of_one_sample_a_program_for_any_number_is_made(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, "compress", "shop:small", "-o", "s.pt2", "--rank", "0.5", "--input", "1,3,10,10", "--dynamic-batch")
    assert torch.export.load("s.pt2").module()(torch.randn(5, 3, 10, 10)).shape == (5, 4)


def test_what_is_to_be_imported_first_is(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys.modules.pop("shop")
    told(capsys, "inspect", "net.pt2", "--import", "shop")
    assert "shop" in sys.modules
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "net.pt2", "--import", "nowhere.at.all"])
    assert caught.value.code == 2
    assert "cannot be imported" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_gets_no_traceback(room: Path) -> None:
    command = [sys.executable, "-m", "fxfact", "inspect", "net.pt2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        running.stdout.close()
        assert running.stderr is not None
        assert "Traceback" not in running.stderr.read()
    assert running.returncode == 141


def test_a_plan_is_made_kept_and_carried_out(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--calibration", "data.npy", "--batch", "8", "--macs", "0.6", "--factorization", "tucker,channel_svd"]
    told(capsys, "plan", "net.pt2", *data, "-o", "plan.json", "--keep-statistics", "kept.npz")
    plan = fxfact.Plan.load("plan.json")
    told(capsys, "plan", "net.pt2", *data, "--workers", "2", "-o", "shared.json")
    assert [decision.rewrite for decision in fxfact.Plan.load("shared.json")] == [decision.rewrite for decision in plan]
    assert {d.factorization.name for d in plan.rewrites if d.factorization} <= {"tucker", "channel_svd"}
    done = told(capsys, "compress", "net.pt2", "-o", "small.pt2", "--plan", "plan.json", "--statistics", "kept.npz")
    assert done["after"]["macs"] == plan.after.macs
    told(capsys, "plan", "net.pt2", "--params", "0.5", "--statistics", "kept.npz", "--multiple-of", "2")
    assert main(["plan", "net.pt2", "--rank", "0.5", "--exclude", "0"]) == 0
    assert "excluded" in capsys.readouterr().out
    assert told(capsys, "plan", "net.pt2", "--rank", "0.5", "--calibration", "data.npy")["plan"]["metric"]
    bound = told(capsys, "plan", "net.pt2", "--loss", "1e-4", "--calibration", "data.npy", "--batch", "24")
    assert 0 < bound["measured_loss_increase"] <= 1e-4


@pytest.mark.parametrize("budget", [fxfact.Macs(0.5), fxfact.Loss(1e-4), None], ids=str)
def test_what_is_written_is_what_factorize_makes(room: Path, capsys: pytest.CaptureFixture[str], budget: Any) -> None:
    asked = {"Macs": ["--macs", "0.5"], "Loss": ["--loss", "1e-4"]}.get(type(budget).__name__, ["--rank", "0.4"])
    data = ["--factorization", "tucker", "--calibration", "data.npy", "--batch", "8"]
    done = told(capsys, "compress", "net.pt2", "-o", "small.pt2", *asked, *data)
    batches = torch.from_numpy(np.load("data.npy")).split(8)
    how: dict[str, Any] = {"rank": 0.4} if budget is None else {"budget": budget}
    expected = fxfact.factorize(fxfact.load("net.pt2"), "tucker", calibration=batches, **how)
    assert done["measured_loss_increase"] == fxfact.plan_of(expected).measured_loss_increase
    told(capsys, "plan", "net.pt2", *asked, *data, "-o", "plan.json")
    told(capsys, "compress", "net.pt2", "-o", "again.pt2", "--plan", "plan.json", *data[2:])
    for file in ("small.pt2", "again.pt2"):
        found = fxfact.load(file).state_dict
        assert found.keys() == expected.state_dict.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.state_dict.items())


def test_beside_statistics_data_are_measured_on(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = ["--factorization", "tucker", "--batch", "8"]
    told(
        capsys, "plan", "net.pt2", *what, "--macs", "0.5", "--calibration", "data.npy", "--keep-statistics", "kept.npz"
    )
    batches = torch.from_numpy(np.load("data.npy")).flip(-1)
    np.save("other.npy", batches.numpy())
    beside = [*what, "--statistics", "kept.npz", "--calibration", "other.npy"]
    statistics = fxfact.Statistics.load("kept.npz")
    for option, budget in (("--macs", fxfact.Macs(0.5)), ("--loss", fxfact.Loss(0.5))):
        found = told(capsys, "plan", "net.pt2", option, "0.5", *beside)["measured_loss_increase"]
        given: dict[str, Any] = {"calibration": statistics, "held_out": batches.split(8)}
        assert found == fxfact.plan(fxfact.load("net.pt2"), "tucker", budget=budget, **given).measured_loss_increase > 0
    assert main(["plan", "net.pt2", "--rank", "0.5", *beside]) == 1
    assert "nothing to measure" in capsys.readouterr().err


def test_a_network_for_a_time_is_written(
    room: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXFACT_CACHE", "times")
    shape = ["--input", "4,3,10,10", "--factorization", "channel_svd"]
    told(capsys, "compress", "shop:small", "-o", "small.pt", "--latency", "0.99", *shape)
    import shop  # noqa: PLC0415

    small = fxfact.load("small.pt", shop.small())
    assert fxfact.plan_of(small).network.ms  # of the dense one, in its fastest form
    assert fxfact.verify(shop.small(), small, torch.randn(4, 3, 10, 10)).ok


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nowhere.pt2"], "no such file"),
        (["inspect", "shop.py"], "package.module:callable"),
        (["inspect", "shop:missing"], "cannot be called"),
        (["inspect", "shop:nothing"], "gives a int"),
        (["inspect", "shop:small", "--weights", "data.npy"], "no state_dict"),
        (["inspect", "net.pt2", "--weights", "state.pt"], "has its own"),
        (["compress", "net.pt2", "-o", "small.pt2", "--plan", "plan.json", "--rank", "4"], "pass no --rank with it"),
        (
            [
                "compress",
                "net.pt2",
                "-o",
                "s.pt2",
                "--plan",
                "p.json",
                "--statistics",
                "k.npz",
                "--calibration",
                "d.npy",
            ],
            "nothing is left to measure",
        ),
        (
            [
                "compress",
                "net.pt2",
                "-o",
                "small.pt2",
                "--plan",
                "plan.json",
                "--macs",
                "0",
                "--multiple-of",
                "8",
                "--exclude",
                "0",
            ],
            "pass no --macs, --multiple-of, --exclude with it",
        ),
        (["plan", "net.pt2", "--macs", "0.5", "--rank", "0.5"], "one of --rank"),
        (["compress", "net.pt2", "-o", "s.pt2", "--plan", "p.json", "--likelihood", "gaussian"], "with --calibration"),
        (["plan", "net.pt2", "--macs", "0.5", "--keep-statistics", "kept.npz"], "pass --calibration"),
        (["plan", "net.pt2", "--macs", "0.5", "--calibration", "shop.py"], "no array"),
        (["plan", "net.pt2", "--macs", "0.5", "--calibration", "."], "fails on a batch|no array|shape"),
        (["compress", "net.pt2", "-o", "small.onnx"], "NAME.pt2 or NAME.pt"),
        (["compress", "net.pt2", "-o", "small.pt"], "written as one"),
        (["compress", "shop:small", "-o", "small.pt2"], "pass --input"),
        (["compress", "net.pt2", "-o", "small.pt2", "--plan", "data.npy"], "not a plan"),
        (["bench", "shop:small", "shop:small"], "pass --input"),
        (["bench", "net.pt2", "net.pt2", "--input", "3,4,16,16"], "fails on these inputs"),
        (["plan", "net.pt2", "--macs", "0.5", "--calibration", "number.npy"], "one number, not samples"),
        (["plan", "net.pt2", "--macs", "0.5", "--calibration", "empty.npy"], "no array that can be read"),
        (["plan", "net.pt2", "--macs", "0.5", "--calibration", "zip.npy"], "no array that can be read"),
        (["plan", "nowhere.pt2", "-o", "no/plan.json"], "no is no folder"),
        (["plan", "nowhere.pt2", "--calibration", "data.npy", "--keep-statistics", "."], "it is a folder"),
        (["plan", "net.pt2", "-o", "net.pt2"], "take the place of what is read"),
        (["compress", "net.pt2", "-o", "./net.pt2"], "take the place of what is read"),
        (["compress", "shop:small", "--weights", "state.pt", "-o", "state.pt"], "take the place of what is read"),
        (["report", "nowhere.pt2", "net.pt2", "-o", "report.htm"], "NAME.html or data NAME.json"),
        (["report", "nowhere.pt2", "net.pt2", "-o", "no/report.html"], "no is no folder"),
        (["inspect", "net.pt2", "--input", "1,3,10,10"], "pass no --input"),
        (["compress", "net.pt2", "-o", "s.pt2", "--dynamic-batch"], "for a module that is made a program"),
        (["plan", "shop:small", "--macs", "0.5"], r"example_inputs is --input 1,3,224,224"),
    ],
)
def test_what_cannot_be_done_is_said(
    room: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    np.save("number.npy", np.float32(1))
    Path("empty.npy").touch()
    Path("zip.npy").write_bytes(b"PK\x03\x04 and nothing more")
    np.save("other.npy", np.zeros((4, 5, 10, 10), dtype=np.float32))
    assert main(arguments) == 1
    assert re.search(words, capsys.readouterr().err)
    assert not (room / "small.pt2").exists()


def test_files_that_are_read_stay_as_they_are_and_statistics_may_be_kept_in_their_own(room: Path) -> None:
    before = Path("net.pt2").read_bytes()
    assert main(["compress", "net.pt2", "-o", "net.pt2"]) == 1
    assert Path("net.pt2").read_bytes() == before
    asked = ["plan", "net.pt2", "--macs", "0.5", "--keep-statistics", "kept.npz"]
    assert main([*asked, "--calibration", "data.npy", "--batch", "8"]) == 0
    assert main([*asked, "--statistics", "kept.npz"]) == 0


def test_packages_of_the_current_folder_are_imported(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(room))])
    Path("mine_of_this_test.py").write_text("")
    Path("failing_of_this_test.py").write_text("1 / 0")
    assert main(["inspect", "net.pt2", "--import", "mine_of_this_test"]) == 0
    with pytest.raises(SystemExit):
        main(["inspect", "net.pt2", "--import", "failing_of_this_test"])
    assert "cannot be imported: division by zero" in capsys.readouterr().err


def test_samples_become_what_the_model_computes_with(room: Path) -> None:
    program = torch.export.load("net.pt2").module().double()
    torch.export.save(torch.export.export(program, (torch.randn(8, 3, 10, 10, dtype=torch.float64),)), "double.pt2")
    np.save("wide.npy", np.load("data.npy").astype(np.float64))
    for data in ("data.npy", "wide.npy"):
        assert main(["plan", "double.pt2", "--macs", "0.5", "--calibration", data, "--batch", "8"]) == 0


def test_a_network_of_another_original_is_not_called_unfactorized(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    torch.export.save(torch.export.export(other, (torch.randn(2, 3, 10, 10),)), "other.pt2")
    assert main(["compress", "net.pt2", "-o", "small.pt2", "--rank", "0.5"]) == 0
    assert main(["verify", "other.pt2", "small.pt2", "--tolerance", "2"]) == 1
    assert "nothing of having been factorized" not in capsys.readouterr().out


def test_what_a_terminal_cannot_show_does_not_fail(room: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "fxfact", "inspect", "net.pt2"],
        capture_output=True, check=True, cwd=room, env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert b"Conv2d(3?16" in shown.stdout


def test_a_plan_is_written_to_a_pipe_that_is_stdout(room: Path) -> None:
    command = f"{sys.executable} -m fxfact plan net.pt2 -o /dev/stdout --json | cat"
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, cwd=room).stdout
    assert '"fxfact plan"' in shown
    assert '"convolutions": 2' in shown


def test_its_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fxfact {importlib.metadata.version('fxfact')}\n"


@pytest.mark.parametrize("command", ["inspect", "plan", "compress", "verify", "bench", "demo"])
def test_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"example: fxfact {command}" in capsys.readouterr().out
