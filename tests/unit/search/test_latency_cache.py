"""The file of measured times: found again on the same machine, replaced if it cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fxfact.search.latency_cache import LatencyCache, describe_machine

TOASTER = {"kind": "toaster"}


def test_latency_cache_finds_saved_times_again_on_the_same_machine_only() -> None:
    cache = LatencyCache(TOASTER)
    assert cache.times_of("a") == {}
    cache.times_of("a")["b"] = 2.0
    cache.save()
    assert LatencyCache(TOASTER).times_of("a") == {"b": 2.0}
    assert LatencyCache(TOASTER).times_of("c") == {}
    assert LatencyCache({"kind": "oven"}).times_of("a") == {}


def test_latency_cache_is_in_the_folder_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXFACT_CACHE", str(tmp_path / "own"))
    assert LatencyCache(TOASTER).path.parent == tmp_path / "own"
    monkeypatch.delenv("FXFACT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert LatencyCache(TOASTER).path.parent == tmp_path / "xdg" / "fxfact"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "damaged"),
        (b"\xff\xfe", "can't decode"),
        (b"[]", "damaged"),
        (b'{"format": "fxfact times", "version": 2, "machine": {}, "ms": {"a": {"b": 1.0}}}', "another machine"),
        (
            b'{"format": "fxfact times", "version": 1, "machine": {"kind": "toaster"}, "ms": {"a": {"b": 1.0}}}',
            "another version",
        ),
        (
            b'{"format": "fxfact times", "version": 2, "machine": {"kind": "toaster"}, "ms": {"a": {"b": -1.0}}}',
            "no times",
        ),
        (b'{"format": "fxfact times", "version": 2, "machine": {"kind": "toaster"}, "ms": {"a": 1.0}}', "damaged"),
        (
            b'{"format": "fxfact times", "version": 2, "machine": {"kind": "toaster"}, "ms": {"a": {"b": "x"}}}',
            "damaged",
        ),
    ],
)
def test_latency_cache_warns_about_a_file_that_cannot_be_used_and_replaces_it(content: bytes, words: str) -> None:
    path = LatencyCache(TOASTER).path
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=words):
        cache = LatencyCache(TOASTER)
    cache.save()
    assert json.loads(path.read_text())["ms"] == {}


def test_latency_cache_that_cannot_be_written_warns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXFACT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="measured again"):
        cache = LatencyCache(TOASTER)
    cache.times_of("a")["b"] = 2.0
    with pytest.warns(UserWarning, match="FXFACT_CACHE"):
        cache.save()
    assert cache.times_of("a") == {"b": 2.0}


def test_machine_description_has_what_the_choice_of_kernels_depends_on() -> None:
    gpu, before, precise = (
        torch.device("cuda"),
        describe_machine(torch.device("cuda")),
        torch.backends.cudnn.conv.fp32_precision,
    )
    assert "threads" not in before
    assert describe_machine(torch.device("cpu"))["threads"] == torch.get_num_threads()
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # cudnn.allow_tf32 does not show this
        assert describe_machine(gpu) != before
    finally:
        torch.backends.cudnn.conv.fp32_precision = precise
    assert describe_machine(gpu) == before
