"""Files are written whole or not at all, and what the dead leave is taken away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunediff.core import disk
from tunediff.core.disk import hash_file, new_folder, partial_of, sweep, update_bytes, write_bytes
from tunediff.core.errors import ArtifactError, NumericsError

LIMITED = """
import resource, sys
from pathlib import Path
from tunediff.core.disk import write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_bytes(Path(sys.argv[1]), b"x" * 5000)
"""


def left_by_the_dead(path: Path) -> Path:
    """The name that a process which has ended would have written `path` under."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    partial = partial_of(path)
    return partial.with_name(partial.name.replace(f"-{os.getpid()}-", f"-{child.pid}-"))


def test_a_write_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    write_bytes(path, b"old")
    monkeypatch.setattr(disk.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ArtifactError, match="No space left") as caught:
        write_bytes(path, b"new and longer")
    assert "resumes" in caught.value.remedy and "14 bytes" in caught.value.expected
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"], "what was half written must not keep its space"


def test_a_limit_on_the_size_of_files_is_told_as_a_full_disk(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "f")], capture_output=True, text=True)
    assert "5,000 bytes of space" in done.stderr and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="could not be written"):
        write_bytes(tmp_path / "file" / "below", b"")


def test_names_are_of_any_length(tmp_path):
    for name in ("x" * 250, "é" * 120):
        write_bytes(tmp_path / name, b"whole")
        assert (tmp_path / name).read_bytes() == b"whole"


def test_two_writers_of_one_file_have_names_of_their_own(tmp_path):
    assert len({partial_of(tmp_path / "file") for _ in range(100)}) == 100


def test_what_is_there_is_not_written_again(tmp_path):
    path = tmp_path / "file"
    update_bytes(path, b"one")
    before = path.stat()
    update_bytes(path, b"one")
    assert path.stat() == before
    update_bytes(path, b"two")
    assert path.read_bytes() == b"two"


def test_only_what_the_dead_were_writing_is_swept(tmp_path):
    (tmp_path / "below").mkdir()
    dead = [left_by_the_dead(tmp_path / "a"), left_by_the_dead(tmp_path / "below" / "b")]
    host = disk.PARTIAL.fullmatch(dead[0].name)["host"]
    theirs = dead[0].with_name(dead[0].name.replace(host, "00000000"))  # of another host
    mine = [tmp_path / ".notes.partial", tmp_path / ".a.12-34.partial", partial_of(tmp_path / "a"), theirs]
    for path in (*dead, *mine):
        path.write_text("half")
    folder = left_by_the_dead(tmp_path / "model")
    folder.mkdir()
    (folder / "weights").write_text("half")
    sweep(tmp_path)
    assert not any(path.exists() for path in (*dead, folder)) and all(path.exists() for path in mine)


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "deep" / "model"
    with pytest.raises(NumericsError), new_folder(out) as partial:
        (partial / "half").write_text("")
        raise NumericsError("wrong")
    for error in (OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")):
        with pytest.raises(ArtifactError, match="could not be written") as caught, new_folder(out):
            raise error
        assert "No space left" in caught.value.got and "free space" in caught.value.remedy
    with pytest.raises(TypeError), new_folder(out):
        raise TypeError("a fault, which is not told as a full disk")
    assert list(out.parent.iterdir()) == []
    with new_folder(out) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("whole")
        assert not out.exists()
    assert (out / "sub" / "file").read_text() == "whole" and list(out.parent.iterdir()) == [out]


def test_a_new_folder_takes_the_place_of_what_a_dead_process_left(tmp_path):
    out = tmp_path / "[model]"
    dead, mine = left_by_the_dead(out), tmp_path / ".[model].partial"
    for folder in (dead, mine):
        folder.mkdir()
        (folder / "file").write_text("half")
    with new_folder(out):
        assert not dead.exists()
    assert mine.is_dir() and out.is_dir()


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = hash_file(path)
    with monkeypatch.context() as patch:
        patch.setattr(disk.hashlib, "file_digest", None)
        assert hash_file(path) == first
        write_bytes(path, b"two")
        second = hash_file(path)  # what was written here was hashed when it was written
    path.write_bytes(b"one")
    assert hash_file(path) == first != second
