"""Files that are written completely or not at all."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path

import pytest

from fxfact.errors import ArgumentError, ArgumentTypeError, FileError
from fxfact.utils import as_json, atomic_write, check_path, write_by_suffix


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640, "permissions stay"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_file_gets_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    with atomic_write(tmp_path / "new") as file:
        file.write(b"new")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_devices_are_written_and_folders_are_refused(tmp_path: Path) -> None:
    with atomic_write(os.devnull) as file:
        file.write(b"anything")
    with pytest.raises(IsADirectoryError, match="is a folder"), atomic_write(tmp_path):
        pass
    with pytest.raises(OSError, match="No such file"), atomic_write(tmp_path / "no" / "file"):
        pass


def test_only_paths_are_accepted() -> None:
    check_path("file")
    check_path(Path("file"))
    with pytest.raises(ArgumentTypeError, match=r"path must be a str or os\.PathLike, got bytes"):
        check_path(b"file")


def test_json_has_null_instead_of_nan_and_infinity() -> None:
    text = as_json({"a": [1.5, math.nan, -math.inf], "b": "NaN"}, indent=1)
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None, None], "b": "NaN"}


def test_text_is_chosen_by_the_suffix_and_made_only_then(tmp_path: Path) -> None:
    made: list[str] = []
    texts = {suffix: lambda suffix=suffix: made.append(suffix) or f"größer{suffix}" for suffix in (".txt", ".json")}
    write_by_suffix(tmp_path / "a.json", "table", texts)
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "größer.json"
    assert made == [".json"]
    with pytest.raises(ArgumentError, match=r"a table is written to NAME\.txt or NAME\.json, got .*a\.html"):
        write_by_suffix(tmp_path / "a.html", "table", texts)
    with pytest.raises(FileError, match="the table cannot be written there"):
        write_by_suffix(tmp_path / "absent" / "a.txt", "table", texts)
    with pytest.raises(ArgumentTypeError, match="path must be"):
        write_by_suffix(3, "table", texts)  # type: ignore[arg-type]
