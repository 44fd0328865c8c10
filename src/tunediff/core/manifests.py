"""Manifests: folders whose manifest is written last, and checked against their files whenever they are opened."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tunediff.core import locks
from tunediff.core.artifacts import json_bytes, plain, read_json, sealed, tensor_bytes, write_json
from tunediff.core.disk import hash_file, make_folder, unwritable, write_bytes
from tunediff.core.errors import ArtifactError
from tunediff.core.progress import tell
from tunediff.core.typed import typed

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
MANIFEST = "manifest.json"
"""The file whose presence says that a folder is finished; it is written last."""
WORK = "work.json"
"""The file of an unfinished folder: what is made in it, and which of its files are whole."""


class DamageError(ArtifactError):
    """A finished folder is not what its manifest says, or the manifest is not what was written."""


@dataclass(frozen=True)
class Stamp:
    """What tells a file's bytes from all others: their number (None in older manifests), and their SHA-256 in hex."""

    bytes: int | None
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of a file as it is."""
        return cls(path.stat().st_size, hash_file(path))

    def fits(self, path: Path) -> bool:
        """Whether the file is there and has these bytes; one of another size is not read."""
        try:
            return path.is_file() and self.bytes in (None, path.stat().st_size) and hash_file(path) == self.sha256
        except OSError:
            return False


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a manifest, which every stage writes last."""
    return (folder / MANIFEST).is_file()


def finish(folder: Path, schema: str, body: Mapping[str, Any], files: Iterable[str]) -> dict[str, Any]:
    """Write and return the manifest of a finished folder: its schema, `body`, and every named file's stamp.

    The manifests of finished folders in it are named as well, so that none can be lost. Files that were kept for going
    on after a kill, and are not named, are removed.
    """
    inner = (f"{path.parent.name}/{MANIFEST}" for path in folder.glob(f"*/{MANIFEST}"))
    stamps = {name: Stamp.of(folder / name) for name in sorted({*files, *inner})}
    manifest = {"schema": schema, **plain(body), "files": plain(stamps)}
    write_json(folder / MANIFEST, sealed(manifest))
    _clear(folder, stamps)
    return manifest


def open_folder(folder: Path, schema: str) -> dict[str, Any]:
    """Return the manifest of a finished folder of this schema.

    The size of every file is compared at every call. Its hash is compared at the first call in a process, and again
    when the file has changed. Raises `ArtifactError` if the folder is unfinished or of another schema, `DamageError` if
    the manifest or a file is not as it was written.
    """
    if not is_finished(folder):
        raise ArtifactError(
            f"{folder} is not a finished {schema} folder",
            expected=MANIFEST,
            got="no manifest",
            remedy="run the stage again; it resumes",
        )
    manifest, stamps = _manifest(folder)
    if manifest.get("schema") != schema:
        raise ArtifactError(
            f"{folder} is of another kind",
            expected=schema,
            got=str(manifest.get("schema")),
            remedy=f"delete {folder}, or use the version that made it",
        )
    for name, stamp in stamps.items():
        path = folder / name
        if not stamp.fits(path):
            raise DamageError(
                f"{path} is {'changed' if path.is_file() else 'missing'}",
                expected=f"sha256 {stamp.sha256[:12]}…",
                remedy=f"delete {folder} and run the stage again",
            )
    return manifest


def kept(
    folder: Path,
    schema: str,
    key: str,
    make: Callable[[], tuple[Mapping[str, Any], Iterable[str]]],
    read: Callable[[], T],
) -> T:
    """What `read` makes of a folder: of the finished one, or else of what `make` writes while no other process does.

    key    what the result depends on; a folder of another key is refused
    make   writes the result, and returns the manifest's body and the names of the files
    read   called when the manifest and its files are found to be as they were written

    A damaged folder is told on stderr and made again, from those of its files that are whole.
    """

    def opened() -> T:
        manifest = open_folder(folder, schema)
        _refuse_other(folder, manifest.get("key"), key)
        if (folder / WORK).exists():  # left by a run that was killed right after its manifest
            _clear(folder, manifest["files"])
        return read()

    with contextlib.suppress(DamageError):
        if is_finished(folder):
            return opened()
    with locks.held(folder):
        try:
            if is_finished(folder):  # by whoever held the lock
                return opened()
        except DamageError as damage:
            tell(f"{damage.what}: it is made again")
            _reopen(folder, key)
        make_folder(folder)
        body, files = make()
        finish(folder, schema, {"key": key, **body}, files)
    return opened()


@dataclass
class Work:
    """A folder in the making: its files are noted as whole when they are written, and a killed run goes on with them.

    files   stamps that each file may have; two where a newer one was about to take its place
    """

    folder: Path
    key: str
    files: dict[str, list[Stamp]] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Path, key: str) -> Work:
        """The work on `key` in a folder, begun or gone on with; raises `ArtifactError` where it is work on another."""
        theirs, files = _noted(folder)
        _refuse_other(folder, theirs, key)
        return cls(folder, key, files)

    def has(self, name: str) -> bool:
        """Whether the file was written by this work and is whole."""
        return any(stamp.fits(self.folder / name) for stamp in self.files.get(name, []))

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically."""
        stamp = Stamp(len(data), hashlib.sha256(data).hexdigest())
        self.files[name] = [*self.files.get(name, [])[-1:], stamp]
        self.note()
        write_bytes(self.folder / name, data, stamp.sha256)

    def note(self) -> None:
        """Write down which files are whole."""
        write_json(self.folder / WORK, sealed({"key": self.key, "files": self.files}))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically."""
        self.write(name, json_bytes(value))

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a safetensors file atomically."""
        self.write(name, tensor_bytes(tensors))


def _manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Stamp]]:
    """A folder's manifest, and the stamps of its files; raises `DamageError` where it is not one."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        files = _inside(manifest["files"]).items()
        given = {name: {"bytes": None, "sha256": stamp} if isinstance(stamp, str) else stamp for name, stamp in files}
        return manifest, typed(dict[str, Stamp], given, str(path))
    except (ArtifactError, LookupError, TypeError, AttributeError) as error:
        raise DamageError(
            f"{path} is damaged", got=str(error), remedy=f"delete {folder} and run the stage again"
        ) from None


def _noted(folder: Path) -> tuple[str | None, dict[str, list[Stamp]]]:
    """The key of an unfinished folder, and its files; nothing of one whose note is missing, damaged or older."""
    try:
        record = read_json(folder / WORK)
        return record["key"], typed(dict[str, list[Stamp]], _inside(record.get("files", {})), WORK)
    except (ArtifactError, LookupError, TypeError, AttributeError):
        return None, {}


def _inside(files: dict[str, Any]) -> dict[str, Any]:
    """The table of a folder's files; raises `ArtifactError` where it names one that is elsewhere."""
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{name!r} is outside of the folder", expected="files inside of it")
    return files


def _refuse_other(folder: Path, theirs: Any, key: str) -> None:
    """Raise `ArtifactError` for a folder of another key; older ones may have none."""
    if theirs not in (None, key):
        raise ArtifactError(
            f"{folder} holds results of other models, text, sites or settings",
            expected=f"key {key}",
            got=str(theirs),
            remedy=f"delete {folder}, or name another folder",
        )


def _reopen(folder: Path, key: str) -> None:
    """Make a finished folder that is damaged an unfinished one, which keeps those of its files that are whole."""
    try:
        manifest, stamps = _manifest(folder)
        _refuse_other(folder, manifest.get("key"), key)
    except DamageError:
        stamps = {}
    whole = {name: [stamp] for name, stamp in stamps.items() if stamp.fits(folder / name)}
    Work(folder, key, whole).note()
    try:
        for path in [folder / MANIFEST, *folder.iterdir()]:
            if path.is_file() and path.name not in {WORK, *whole}:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None


def _clear(folder: Path, named: Iterable[str]) -> None:
    """Remove the note of a finished folder, and the files that only the work on it needed."""
    _, files = _noted(folder)
    with contextlib.suppress(OSError):  # on a read-only disk they stay
        for name in files.keys() - set(named):
            (folder / name).unlink(missing_ok=True)
        (folder / WORK).unlink(missing_ok=True)
