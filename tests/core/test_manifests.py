"""A finished folder is read as it was written, or made again, or refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from bit_flips import flipped

from tunediff.core.artifacts import read_json, sealed, write_json
from tunediff.core.errors import ArtifactError
from tunediff.core.manifests import MANIFEST, WORK, DamageError, Work, finish, is_finished, kept, open_folder


def made(folder: Path, key: str = "k", text: str = "result") -> list[str]:
    """The result of `kept` in `folder`, and a word for every time that it had to be made."""
    calls = []

    def make():
        calls.append("made")
        work = Work.at(folder, key)
        for name in ("one", "two"):
            if not work.has(name):
                calls.append(name)
                work.write(name, f"{text} {name}".encode())
        (folder / "all").write_text(text)
        return {"n": 1}, ["all", "one"]

    return [kept(folder, "kind/1", key, make, (folder / "all").read_text), *calls]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_finished_when_its_manifest_is_there(tmp_path):
    (tmp_path / "data").write_bytes(b"abc")
    with pytest.raises(ArtifactError, match="not a finished kind/1") as caught:
        open_folder(tmp_path, "kind/1")
    assert "again" in caught.value.remedy and not is_finished(tmp_path)
    manifest = finish(tmp_path, "kind/1", {"n": 1}, ["data"])
    assert open_folder(tmp_path, "kind/1") == manifest == read_json(tmp_path / MANIFEST) and is_finished(tmp_path)
    with pytest.raises(ArtifactError, match="another kind") as caught:
        open_folder(tmp_path, "kind/2")
    assert (caught.value.expected, caught.value.got) == ("kind/2", "kind/1") and caught.type is ArtifactError
    for damage in (b"abd", b"ab"):
        (tmp_path / "data").write_bytes(damage)
        with pytest.raises(DamageError, match="data is changed"):
            open_folder(tmp_path, "kind/1")
    (tmp_path / "data").unlink()
    with pytest.raises(DamageError, match="data is missing"):
        open_folder(tmp_path, "kind/1")


def test_a_result_is_made_once(tmp_path):
    folder = tmp_path / "f"
    assert made(folder) == ["result", "made", "one", "two"] and made(folder) == ["result"]
    assert sorted(bytes_of(folder)) == ["all", MANIFEST, "one"], "what only the work needed is gone"
    with pytest.raises(ArtifactError, match="other models, text, sites or settings") as caught:
        made(folder, key="other")
    assert (caught.value.expected, caught.value.got) == ("key other", "k") and made(folder) == ["result"]


@pytest.mark.parametrize("name", ["all", "one", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "swap"])
def test_a_damaged_folder_is_made_again_and_told(tmp_path, capsys, name, damage):
    folder, other = tmp_path / "f", tmp_path / "other"
    made(folder)
    made(other, "other", "results")
    before, path = bytes_of(folder), folder / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    data = {"cut": data[: len(data) // 2], "empty": b"", "swap": (other / name).read_bytes()}.get(damage, data)
    path.unlink() if damage == "gone" else path.write_bytes(data)
    if damage == "swap" and name == MANIFEST:  # a whole manifest of another key is no damage
        with pytest.raises(ArtifactError, match="other models"):
            made(folder)
        return
    result, *calls = made(folder)
    assert result == "result" and bytes_of(folder) == before and calls[0] == "made"
    told = capsys.readouterr().err
    assert told == "" if (damage, name) == ("gone", MANIFEST) else str(path) in told and told.endswith("made again\n")
    if name != MANIFEST:
        assert ("one" in calls) == (name == "one"), "what is whole is kept"


def test_every_bit_of_a_manifest_counts(tmp_path):
    """A flipped bit is found, or leaves what is read as it was."""
    made(tmp_path / "f")
    path, manifest = tmp_path / "f" / MANIFEST, open_folder(tmp_path / "f", "kind/1")
    for _ in flipped(path, 8):
        try:
            read = open_folder(tmp_path / "f", "kind/1")
        except ArtifactError:
            continue
        assert {name: read[name] for name in manifest} == manifest


def test_work_goes_on_with_what_is_whole(tmp_path):
    folder = tmp_path / "f"
    work = Work.at(folder, "k")
    work.write("one", b"result one")
    (folder / "two").write_bytes(b"not noted, and so not believed")
    assert work.has("one") and Work.at(folder, "k").has("one") and not Work.at(folder, "k").has("two")
    assert made(folder) == ["result", "made", "two"]
    with pytest.raises(ArtifactError, match="other models"):
        Work.at(tmp_path / "g", "k").note() or Work.at(tmp_path / "g", "other")
    (tmp_path / "g" / WORK).write_text('{"key"')
    assert Work.at(tmp_path / "g", "other").files == {}, "a note that is damaged says nothing"


def test_a_file_that_was_about_to_be_replaced_is_whole_before_and_after(tmp_path):
    work = Work.at(tmp_path, "k")
    work.write("state", b"first")
    before = (tmp_path / "state").read_bytes()
    work.write("state", b"second")
    assert Work.at(tmp_path, "k").has("state")
    (tmp_path / "state").write_bytes(before)  # as if killed between the note and the file
    assert Work.at(tmp_path, "k").has("state")
    work.write("state", b"third")
    (tmp_path / "state").write_bytes(before)
    assert not Work.at(tmp_path, "k").has("state")


def test_a_manifest_of_an_older_version_is_read(tmp_path):
    (tmp_path / "data").write_bytes(b"abc")
    older = {"schema": "kind/1", "files": {"data": hashlib.sha256(b"abc").hexdigest()}}
    (tmp_path / MANIFEST).write_text(json.dumps(older))
    assert open_folder(tmp_path, "kind/1") == older
    assert kept(tmp_path, "kind/1", "k", None, lambda: "read") == "read"
    (tmp_path / "data").write_bytes(b"abd")
    with pytest.raises(DamageError, match="changed"):
        open_folder(tmp_path, "kind/1")


def test_a_lost_manifest_inside_is_a_damage(tmp_path):
    (tmp_path / "inner").mkdir()
    finish(tmp_path / "inner", "inner/1", {}, [])
    finish(tmp_path, "kind/1", {}, [])
    shutil.rmtree(tmp_path / "inner")
    with pytest.raises(DamageError, match=f"inner/{MANIFEST} is missing"):
        open_folder(tmp_path, "kind/1")


@pytest.mark.parametrize("name", ["../mine", "/etc/hosts", "a/../../mine"])
def test_files_outside_are_neither_read_nor_removed(tmp_path, name):
    """Manifests and notes may come from strangers."""
    folder = tmp_path / "f"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "mine").write_text("mine")
    stamp = {"bytes": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    write_json(folder / WORK, sealed({"key": "k", "files": {name: [stamp]}}))
    assert Work.at(folder, "k").files == {}
    finish(folder, "kind/1", {}, [])
    write_json(folder / MANIFEST, sealed({"schema": "kind/1", "files": {name: stamp}}))
    with pytest.raises(DamageError, match="damaged"):
        open_folder(folder, "kind/1")
    assert (tmp_path / "mine").read_text() == "mine"
