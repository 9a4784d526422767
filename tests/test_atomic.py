"""Folders are whole or not there, also while they are removed."""

import shutil
from pathlib import Path

import pytest

from schemas.atomic import remove_folder


def test_a_folder_that_cannot_be_removed_has_lost_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "segment"
    folder.mkdir()
    (folder / "a").write_bytes(b"a")
    (folder / "b").write_bytes(b"b")

    def remove_one(path: Path, ignore_errors: bool = False) -> None:
        (path / "a").unlink()
        if not ignore_errors:
            raise OSError(16, "busy")

    monkeypatch.setattr(shutil, "rmtree", remove_one)
    remove_folder(folder)
    assert not folder.exists()


def test_a_folder_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "segment"
    folder.mkdir()
    (folder / "a").write_bytes(b"a")
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []
