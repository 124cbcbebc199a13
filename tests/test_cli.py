from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

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
