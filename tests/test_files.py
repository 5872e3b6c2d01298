"""Files are the old ones or the new ones."""

from __future__ import annotations

import os

import pytest

from redconvert import files
from redconvert.errors import RedconvertError
from redconvert.files import write_bytes_atomic, write_text_atomic


def test_writes_and_overwrites(tmp_path):
    path = tmp_path / "a.txt"
    write_text_atomic(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    path.chmod(0o640)
    write_bytes_atomic(str(path), b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o640)
    assert list(tmp_path.iterdir()) == [path]


def test_writes_through_links(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text_atomic(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"


def test_a_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_says_what_cannot_be_written(tmp_path):
    for path in (tmp_path / "none" / "a.txt", tmp_path):
        with pytest.raises(RedconvertError, match=r"cannot write .* existing folder"):
            write_text_atomic(path, "text")
    assert list(tmp_path.iterdir()) == []


def test_devices_are_written_directly():
    write_text_atomic(os.devnull, "text")
    assert not os.path.isfile(os.devnull)
