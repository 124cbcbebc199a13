"""What commands read and write, and the messages for what they cannot use."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fxfact.cli import main

COMPRESS = ["compress", "net.pt2", "-o", "small.pt2"]
METRIC = ["plan", "net.pt2", "--at-most-drop", "0.1", "--metric"]
PLAN = ["plan", "net.pt2", "--macs", "0.5"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nowhere.pt2"], "no such file"),
        (["inspect", "shop.py"], "package.module:callable"),
        (["inspect", "shop:missing"], "cannot be called"),
        (["inspect", "shop:nothing"], "returned a int, expected a torch.nn.Module"),
        (["inspect", "shop:small", "--weights", "data.npy"], "cannot be loaded as the state dict of shop:small"),
        (["inspect", "net.pt2", "--weights", "state.pt"], "contains its weights"),
        (["inspect", "net.pt2", "--input", "1,3,10,10"], "Remove --input"),
        ([*COMPRESS, "--plan", "plan.json", "--rank", "4"], "Remove --rank"),
        (
            [*COMPRESS, "--plan", "plan.json", "--macs", "0.5", "--multiple-of", "8", "--exclude", "0"],
            "Remove --macs, --multiple-of, --exclude",
        ),
        ([*COMPRESS, "--plan", "p.json", "--statistics", "k.npz", "--calibration", "d.npy"], "not use --calibration"),
        ([*COMPRESS, "--plan", "p.json", "--likelihood", "gaussian"], "Pass --calibration"),
        ([*COMPRESS, "--plan", "data.npy"], "not a plan"),
        ([*COMPRESS, "--rank", "0.5", "--dynamic-batch"], "only applies when a module is exported"),
        (["compress", "net.pt2", "-o", "small.onx", "--rank", "0.5"], "NAME.pt2 .*, NAME.onnx or NAME.pt "),
        (["compress", "net.pt2", "-o", "small.pt", "--rank", "0.5"], "MODEL is an exported program.*Pass -o NAME.pt2"),
        (["compress", "shop:small", "-o", "small.pt2", "--rank", "0.5"], "--input 1,3,224,224"),
        (COMPRESS, r"one of --macs, .*: fxfact compress net.pt2 -o small.pt2 --macs 0.5 --calibration images.npy"),
        ([*COMPRESS, "--calibration", "data.npy"], r"--macs 0.5 --calibration data.npy\n"),
        ([*PLAN, "--rank", "0.5"], "Pass only one of --macs, .*--rank"),
        (
            [*PLAN, "--at-most-drop", "0.5", "--minimise", "params"],
            "--at-most-drop, --minimise can only be used",
        ),
        (["plan", "net.pt2", "--metric", "shop:score"], "Pass --at-most-drop 0.5"),
        ([*METRIC, "shop:nowhere"], r"--metric shop:nowhere cannot be imported.*Pass package.module:callable"),
        ([*METRIC, "shop"], "--metric shop cannot be imported"),
        ([*METRIC, "shop:small"], "--metric raised on the dense network: TypeError"),
        ([*METRIC, "shop:nan"], "--metric returned 1 NaN or Inf"),
        ([*PLAN, "--keep-statistics", "kept.npz"], "Pass --calibration"),
        ([*PLAN, "--calibration", "shop.py"], "cannot be read as an array"),
        ([*PLAN, "--calibration", "."], "fails on a batch|cannot be read|shape"),
        ([*PLAN, "--calibration", "number.npy"], "expected samples along the first axis"),
        ([*PLAN, "--calibration", "empty.npy"], "cannot be read as an array"),
        ([*PLAN, "--calibration", "zip.npy"], "cannot be read as an array"),
        ([*PLAN, "--calibration", "folder"], "the folder contains no .npy or .npz file"),
        ([*PLAN, "--error-curves", "data.npy"], "no error curves that can be read"),
        ([*PLAN, "--error-curves", "net.pt2"], "would overwrite an input"),
        (["plan", "net.pt2", "--rank", "0.5", "--error-curves", "curves.json"], "only used with a budget"),
        (["plan", "shop:small", "--macs", "0.5"], r"needs example inputs \(--input 1,3,224,224\), which"),
        (["plan", "nowhere.pt2", "-o", "no/plan.json"], "no is not a folder"),
        (["plan", "nowhere.pt2", "--calibration", "data.npy", "--keep-statistics", "."], "it is a folder"),
        (["plan", "net.pt2", "-o", "net.pt2"], "would overwrite an input"),
        (["compress", "net.pt2", "-o", "./net.pt2"], "would overwrite an input"),
        (["compress", "shop:small", "--weights", "state.pt", "-o", "state.pt"], "would overwrite an input"),
        (["bench", "shop:small", "shop:small"], "--input 1,3,224,224"),
        (["bench", "net.pt2", "net.pt2", "--input", "3,4,16,16"], "fails on these inputs"),
        (["report", "nowhere.pt2", "net.pt2", "-o", "report.htm"], "NAME.html .* or NAME.json"),
        (["report", "nowhere.pt2", "net.pt2", "-o", "no/report.html"], "no is not a folder"),
    ],
)
def test_errors_are_messages_and_exit_with_1(
    workspace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    np.save("number.npy", np.float32(1))
    Path("folder").mkdir()
    Path("empty.npy").touch()
    Path("zip.npy").write_bytes(b"PK\x03\x04 and nothing more")
    np.save("other.npy", np.zeros((4, 5, 10, 10), dtype=np.float32))
    assert main(arguments) == 1
    assert re.search(words, capsys.readouterr().err)
    assert not (workspace / "small.pt2").exists()


def test_input_files_are_not_overwritten(workspace: Path) -> None:
    before = Path("net.pt2").read_bytes()
    assert main(["compress", "net.pt2", "-o", "net.pt2"]) == 1
    assert Path("net.pt2").read_bytes() == before


def test_statistics_can_be_kept_in_the_file_that_they_came_from(workspace: Path) -> None:
    arguments = [*PLAN, "--keep-statistics", "kept.npz"]
    assert main([*arguments, "--calibration", "data.npy", "--batch", "8"]) == 0
    assert main([*arguments, "--statistics", "kept.npz"]) == 0


def test_samples_are_converted_to_the_dtype_of_the_model(workspace: Path) -> None:
    program = torch.export.load("net.pt2").module().double()
    torch.export.save(torch.export.export(program, (torch.randn(8, 3, 10, 10, dtype=torch.float64),)), "double.pt2")
    np.save("wide.npy", np.load("data.npy").astype(np.float64))
    for data in ("data.npy", "wide.npy"):
        assert main(["plan", "double.pt2", "--macs", "0.5", "--calibration", data, "--batch", "8"]) == 0
