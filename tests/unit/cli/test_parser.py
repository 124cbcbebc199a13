"""Arguments, help texts, exit statuses and streams of the command line."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxfact.cli import main, parser

COMMANDS = ("inspect", "plan", "compress", "verify", "bench", "report", "demo")


@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--epochs", "0"], ["demo", "--rank", "much"]])
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: fxfact" in capsys.readouterr().err


def test_package_runs_as_a_module_and_as_a_command() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "fxfact", "demo", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "example: fxfact demo" in printed
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="fxfact")
    assert command.load() is main


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"example: fxfact {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_help_groups_the_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = capsys.readouterr().out
    for group in (
        "model:",
        "output:",
        "what the network may cost (pass one):",
        "with --metric:",
        "data (no labels",
        "convolutions and linear layers:",
        "computation:",
    ):
        assert f"\n{group}" in printed


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fxfact {importlib.metadata.version('fxfact')}\n"


def test_help_and_version_do_not_import_pytorch() -> None:
    script = (
        "import sys, fxfact.cli\ntry:\n  fxfact.cli.main(sys.argv[1:])\nfinally:\n  assert 'torch' not in sys.modules"
    )
    for arguments in (["--version"], ["--help"], ["compress", "--help"]):
        subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("option", "text", "arguments"),
    [
        ("--macs", "0.5", {"fraction": 0.5}),
        ("--macs", "50%", {"fraction": 0.5}),
        ("--macs", "1", {"fraction": 1.0}),
        ("--macs", "20M", {"at_most": 20e6}),
        ("--macs", "1.5G", {"at_most": 1.5e9}),
        ("--macs", "0.5M", {"at_most": 0.5e6}),
        ("--params", "900k", {"at_most": 900e3}),
        ("--params", "900000", {"at_most": 900e3}),
        ("--latency", "0.4", {"fraction": 0.4}),
        ("--latency", "12.5ms", {"at_most_ms": 12.5}),
    ],
)
def test_sizes_are_shares_or_amounts(option: str, text: str, arguments: dict[str, float]) -> None:
    parsed = parser.build_parser().parse_args(["plan", "net.pt2", option, text])
    assert getattr(parsed, option.removeprefix("--")) == pytest.approx(arguments)


@pytest.mark.parametrize(
    ("option", "text", "example"),
    [
        *(
            (option, text, "a number such as 20M")
            for option in ("--macs", "--params")
            for text in ("0", "-1", "half", "5B")
        ),
        *(("--latency", text, "milliseconds such as 12ms") for text in ("12", "12s", "0", "20M")),
    ],
)
def test_sizes_that_are_none_are_refused(
    option: str, text: str, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "net.pt2", f"{option}={text}"])
    assert caught.value.code == 2
    assert example in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "shell"),
    [
        (
            "pass two or more as calibration, or fxfact.Statistics and held_out=batches",
            "pass two or more as --calibration, or --statistics FILE and --calibration DATA",
        ),
        ("calibration: batch 3 is empty", "--calibration: batch 3 is empty"),
        ("the calibration data are few", "the calibration data are few"),
        ("Pass budget=fxfact.Macs(0.5).", "Pass --macs 0.5."),
        ("include: no layer at 'x'", "--include: no layer at 'x'"),
        ("use capture='modules'", "use capture='modules' (capture= can only be passed in Python.)"),
    ],
)
def test_messages_name_options(message: str, shell: str) -> None:
    parsed = parser.build_parser().parse_args(["plan", "net.pt2"])
    assert parser.in_shell_words(message, parsed) == shell


def test_messages_name_no_option_that_a_command_lacks() -> None:
    parsed = parser.build_parser().parse_args(["inspect", "net.pt2"])
    assert parser.in_shell_words("Pass them as calibration=", parsed) == "Pass them as calibration="


def test_import_option_imports_a_package_first(
    workspace: Path, capsys: pytest.CaptureFixture[str], run_json: Callable[..., Any]
) -> None:
    sys.modules.pop("shop")
    run_json("inspect", "net.pt2", "--import", "shop")
    assert "shop" in sys.modules
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "net.pt2", "--import", "nowhere.at.all"])
    assert caught.value.code == 2
    assert "cannot be imported" in capsys.readouterr().err


def test_import_option_finds_packages_of_the_current_folder(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(workspace))])
    Path("mine_of_this_test.py").write_text("")
    Path("failing_of_this_test.py").write_text("1 / 0")
    assert main(["inspect", "net.pt2", "--import", "mine_of_this_test"]) == 0
    with pytest.raises(SystemExit):
        main(["inspect", "net.pt2", "--import", "failing_of_this_test"])
    assert "cannot be imported: division by zero" in capsys.readouterr().err


def test_closed_pipe_gives_no_traceback(workspace: Path) -> None:
    command = [sys.executable, "-m", "fxfact", "inspect", "net.pt2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        running.stdout.close()
        assert running.stderr is not None
        assert "Traceback" not in running.stderr.read()
    assert running.returncode == 141


def test_characters_that_a_terminal_cannot_show_are_replaced(workspace: Path) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "fxfact", "inspect", "net.pt2"],
        capture_output=True,
        check=True,
        cwd=workspace,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert b"Conv2d(3?16" in printed.stdout


def test_plan_can_be_written_to_a_pipe(workspace: Path) -> None:
    command = f"{sys.executable} -m fxfact plan net.pt2 -o /dev/stdout --json | cat"
    printed = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, cwd=workspace).stdout
    assert '"fxfact plan"' in printed
    assert '"convolutions": 3' in printed


def test_warnings_are_lines_of_the_command(workspace: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fxfact",
        "compress",
        "net.pt2",
        "-o",
        "same.pt2",
        "--rank",
        "0.5",
        "--exclude",
        "*",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=workspace)
    (line,) = done.stderr.splitlines()
    assert line.startswith("fxfact: warning: factorize rewrote none of the 3 layers")
