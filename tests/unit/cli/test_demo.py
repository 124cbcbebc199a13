"""The demo command."""

from __future__ import annotations

import re
import sys

import pytest

from fxfact.cli import main


@pytest.mark.integration
def test_demo_shows_plan_and_comparison_and_ends_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the demo is an extra: pip install 'fxfact[demo]'")
    assert main(["demo", "--epochs", "1", "--factorization", "channel_svd", "--rank", "0.5"]) == 0
    printed = capsys.readouterr()
    for words in ("1348 images", "channel_svd", "6 of 7", "accuracy", "calibration=batches"):
        assert words in printed.out
    last = printed.out.strip().splitlines()[-1]
    assert re.search(
        r"became \d+\.\d times as small and \d+\.\d times as fast, and it is .* on held-out digits\.$", last
    )
    assert "epoch 1 of 1" in printed.err


def test_demo_without_scikit_learn_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo"]) == 1
    assert "pip install 'fxfact[demo]'" in capsys.readouterr().err


def test_demo_reports_a_wrong_rank_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--rank", "0"]) == 1
    assert "positive" in capsys.readouterr().err
